"""One block from its sources, in memory: read, widen, add in checkpoint order, divide once, cast once."""

# N checkpoints, B elements in a span

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pma.averaging import accumulate, equal
from pma.averaging.accumulate import TORCH_DTYPES
from pma.engine.blocks import Block, Piece, Policy, Span
from pma.errors import InputError, Interrupted, printable
from pma.formats.contracts import CheckpointReader, ReadRequest, range_requests
from pma.types import DType, TensorSpec


class Stop(Protocol):
    """Tells whether the work was called off, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """True once it was."""


class BlockWorker:
    """The buffers of one thread, reused for every block it makes."""

    def __init__(
        self,
        readers: Sequence[CheckpointReader],
        weights: Sequence[float],
        *,
        allow_nonfinite: bool = False,
        stop: Stop | None = None,
    ) -> None:
        self._readers = readers
        weights_N = np.asarray(weights, dtype=np.float64)
        self._equal = equal(weights_N)
        self._weights: list[float | None] = [None if self._equal else float(w) for w in weights_N]
        self._allow_nonfinite = allow_nonfinite
        self._stop = stop
        self._buffers: dict[str, Tensor] = {}

    def make(self, block: Block) -> memoryview:
        """The block's bytes, valid until the next call. Raises InputError for a value that is not finite."""
        out = self._buffer("out", torch.uint8, block.length_bytes)
        view = _view(out)
        for offset, data in block.constants:
            view[offset : offset + len(data)] = data
        copied = [span for span in block.spans if span.policy is Policy.COPY_NEWEST]
        averaged = [span for span in block.spans if span.policy is Policy.AVERAGE]
        for span in copied:
            self._copy(span, view)
        if averaged:
            self._average(averaged, out)
        return view

    def _copy(self, span: Span, view: memoryview) -> None:
        newest = self._readers[-1]
        requests: list[ReadRequest] = []
        for piece in span.pieces:
            spec = newest.tensors[piece.tensor]
            as_bytes = TensorSpec(name=spec.name, dtype=DType.U8, shape=(spec.length_bytes,))
            into = view[piece.block_offset : piece.block_offset + piece.stop - piece.start]
            requests += _requests(newest, as_bytes, piece, into)
        newest.read_many(requests)
        if span.dtype_in.kind in ("float", "complex") and not self._allow_nonfinite:
            for piece in span.pieces:
                self._check_copied(piece, newest)

    def _check_copied(self, piece: Piece, newest: CheckpointReader) -> None:
        """A copied tensor may hold NaN no more than an averaged one. Its pieces are small; they are read
        again.
        """
        spec = newest.tensors[piece.tensor]
        width = spec.dtype.bits // 8
        start, stop = piece.start // width, -(-piece.stop // width)
        raw = torch.empty((stop - start) * width, dtype=torch.uint8)
        newest.read_many(list(range_requests(spec, newest.fragments(piece.tensor), start, stop, _view(raw))))
        wrong = (~torch.isfinite(_typed(raw, spec.dtype))).nonzero()
        if len(wrong):
            per_element = len(_typed(raw, spec.dtype)) // max(stop - start, 1)
            index = _index(spec, start + int(wrong[0]) // per_element)
            raise InputError(
                f"{printable(piece.tensor)}{list(index)} in {newest.path} is not finite; every value must "
                "be. Go on "
                "regardless with --allow-nonfinite"
            )

    def _average(self, spans: Sequence[Span], out: Tensor) -> None:
        lengths = [span.element_count * span.dtype_in.bits // 8 for span in spans]
        starts = [0, *np.cumsum([-(-length // 8) * 8 for length in lengths]).tolist()]
        raw = self._buffer("raw", torch.uint8, starts[-1])
        raw_view = _view(raw)
        accumulators = self._accumulators(spans)
        for n, (reader, weight) in enumerate(zip(self._readers, self._weights, strict=True)):
            if self._stop is not None and self._stop.is_set():
                raise Interrupted("stopped")
            requests: list[ReadRequest] = []
            for span, start in zip(spans, starts, strict=False):
                requests += _span_requests(reader, span, raw_view, start)
            reader.read_many(requests)
            for span, start, length, accumulator_B in zip(spans, starts, lengths, accumulators, strict=False):
                values_B = _typed(raw[start : start + length], span.dtype_in)
                scratch = self._buffer(f"scratch {accumulator_B.dtype}", accumulator_B.dtype, 65_536)
                accumulate.add(accumulator_B, values_B, scratch, weight=weight, first=n == 0)
        for span, accumulator_B in zip(spans, accumulators, strict=True):
            if not self._allow_nonfinite and not accumulate.all_finite(accumulator_B):
                raise self._nonfinite(span)
            out_B = _typed(out[span.block_offset : span.block_offset + span.length_bytes], span.dtype_out)
            accumulate.finish(accumulator_B, out_B, divisor=len(self._readers) if self._equal else None)
            narrowed = span.dtype_out is not span.dtype_in
            if narrowed and not self._allow_nonfinite and not accumulate.all_finite(out_B):
                names = ", ".join(printable(piece.tensor) for piece in span.pieces[:3])
                raise InputError(
                    f"{names}: a mean is too large for {span.dtype_out.value[0]}; choose a wider --dtype, or "
                    "keep "
                    "infinity with --allow-nonfinite"
                )

    def _accumulators(self, spans: Sequence[Span]) -> list[Tensor]:
        counts = [_real_count(span) for span in spans]
        dtypes = [accumulate.accumulator_dtype(span.dtype_in) for span in spans]
        totals = {
            dtype: sum(c for c, d in zip(counts, dtypes, strict=True) if d == dtype) for dtype in set(dtypes)
        }
        free = {dtype: self._buffer(f"accumulator {dtype}", dtype, total) for dtype, total in totals.items()}
        parts = []
        for count, dtype in zip(counts, dtypes, strict=True):
            parts.append(free[dtype][:count])
            free[dtype] = free[dtype][count:]
        return parts

    def _buffer(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        held = self._buffers.get(name)
        if held is None or len(held) < count:
            self._buffers[name] = held = torch.empty(count, dtype=dtype)
        return held[:count]

    def _nonfinite(self, span: Span) -> InputError:
        """Find the checkpoint, tensor and index that made a span's sum not finite."""
        for reader in self._readers:
            for piece in span.pieces:
                spec = reader.tensors[piece.tensor]
                raw = torch.empty((piece.stop - piece.start) * spec.dtype.bits // 8, dtype=torch.uint8)
                reader.read_many(_requests(reader, spec, piece, _view(raw)))
                wrong = (~torch.isfinite(_typed(raw, spec.dtype))).nonzero()
                if len(wrong):
                    value = _typed(raw, spec.dtype)[wrong[0]].item()
                    index = _index(
                        spec, piece.start + int(wrong[0]) // (_real_count(span) // span.element_count)
                    )
                    return InputError(
                        f"{printable(piece.tensor)}{list(index)} in {reader.path}: {value}; every value must "
                        "be finite. "
                        "Leave that checkpoint out, or go on regardless with --allow-nonfinite"
                    )
        names = ", ".join(printable(piece.tensor) for piece in span.pieces[:3])
        return InputError(
            f"{names}: the values are finite but their sum overflows; --allow-nonfinite keeps infinity"
        )


def _requests(
    reader: CheckpointReader, spec: TensorSpec, piece: Piece, into: memoryview
) -> list[ReadRequest]:
    return list(range_requests(spec, reader.fragments(piece.tensor), piece.start, piece.stop, into))


def _span_requests(reader: CheckpointReader, span: Span, raw: memoryview, start: int) -> list[ReadRequest]:
    requests: list[ReadRequest] = []
    element_bytes = span.dtype_in.bits // 8
    for piece in span.pieces:
        length = (piece.stop - piece.start) * element_bytes
        requests += _requests(reader, reader.tensors[piece.tensor], piece, raw[start : start + length])
        start += length
    return requests


def _real_count(span: Span) -> int:
    return span.element_count * (2 if span.dtype_in is DType.C64 else 1)


def _view(raw: Tensor) -> memoryview:
    return memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's stubs for 3.11 do not say it is a buffer


def _typed(raw: Tensor, dtype: DType) -> Tensor:
    # a complex number is averaged as its two real parts
    return raw.view(torch.float32 if dtype is DType.C64 else TORCH_DTYPES[dtype])


def _index(spec: TensorSpec, flat: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, spec.shape)) if spec.shape else ()
