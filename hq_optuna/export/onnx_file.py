"""The format ``onnx``: see `hq_optuna.export.onnx_graph`; checked by `hq_optuna.export.check`."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from hq_optuna.errors import ExportError
from hq_optuna.export.check import Check, OnnxNetwork, check_file
from hq_optuna.export.job import Job, compared_figures
from hq_optuna.export.onnx_graph import Containers, onnx_graph, stored_bytes
from hq_optuna.export.tracing import traced


def content(job: Job) -> tuple[bytes, int, Check | None]:
    """Return the file, the bytes its numbers take, and what its check found."""
    program = traced(job.deployed, job.data)
    model = onnx_graph(job.deployed, program, Containers(job.weights))
    model.producer_name = "hq_optuna"
    model.metadata_props.update(job.about)
    proto = ir.serde.serialize_model(model)
    data = serialized(proto)
    found = None
    if job.samples:
        figures = compared_figures(job, OnnxNetwork(data, job.network)) if job.evaluate else None
        found = check_file(
            proto, job.reference, job.deployed, job.data, job.samples, figures=figures
        )
    return data, stored_bytes(model), found


def serialized(proto: onnx.ModelProto) -> bytes:
    """Return a model's bytes, checked by ONNX itself.

    Raises:
        ExportError: It is larger than one file can be, or ONNX's own rules refuse it.
    """
    if proto.ByteSize() >= 2**31:
        raise ExportError(
            f"The file would have {proto.ByteSize():,} bytes, and one ONNX file holds 2 GiB. Give "
            "layers fewer bits, or write --format pt2."
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # of the checker and of shape inference, each with its own class
        raise ExportError(f"ONNX refuses the file: {' '.join(str(error).split())[:400]}") from error
    found: bytes = proto.SerializeToString()
    return found
