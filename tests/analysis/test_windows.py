"""Windows of tokens: what they hold and how they are divided."""

import numpy as np
import pytest

from pma.analysis.windows import cut, fitting
from pma.errors import InputError


def test_windows_are_pieces_of_documents_that_do_not_overlap():
    documents = [list(range(100 * d, 100 * d + 23)) for d in range(4)]
    windows = cut(documents, context_tokens=4, windows=9)
    assert windows.ids_WC.shape == (9, 5)
    seen = windows.ids_WC.ravel().tolist()
    assert len(set(seen)) == len(seen)
    for ids, document in zip(windows.ids_WC, windows.document_W, strict=True):
        assert (np.diff(ids) == 1).all()
        assert (ids // 100 == document).all()
    assert sorted(np.bincount(windows.document_W)) == [2, 2, 2, 3]  # each in turn
    assert np.array_equal(windows.ids_WC, cut(documents, context_tokens=4, windows=9).ids_WC)


def test_batches_share_no_document_and_lose_none():
    documents = [list(range(30)) for _ in range(7)]
    windows = cut(documents, context_tokens=4, windows=20)
    parts = windows.batches(3)
    assert len(parts) == 3
    sets = [set(part.document_W.tolist()) for part in parts]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 7
    assert sum(len(part.ids_WC) for part in parts) == 20
    assert len(windows.batches(50)) == 7


def test_short_documents_are_passed_over_and_too_little_text_is_told():
    assert set(cut([[1] * 3, [2] * 11], context_tokens=4, windows=2).document_W.tolist()) == {1}
    with pytest.raises(InputError, match="2 windows of 5 tokens, expected 3"):
        cut([[1] * 3, [2] * 11], context_tokens=4, windows=3)


def test_windows_become_shorter_where_documents_are():
    def shape(lengths, **how):
        return fitting([[1] * length for length in lengths], **how).ids_WC.shape

    assert shape([300] * 10, context_tokens=64, tokens=640) == (10, 65)
    assert shape([300] * 10, context_tokens=64, tokens=10**6) == (40, 65)  # all there is
    assert shape([40] * 10, context_tokens=64, tokens=640) == (10, 33)
    assert shape([500, *[20] * 30], context_tokens=64, tokens=10**6) == (59, 17)  # most text is in short ones
    assert shape([20, 20, 20], context_tokens=16, tokens=1) == (2, 17)  # two documents at least
    with pytest.raises(InputError, match="no windows of 16 tokens"):
        fitting([[1] * 500, [1] * 9], context_tokens=64, tokens=640)
