import pytest

from tests.conftest import INTERPRETING


@pytest.fixture(autouse=True)
def _tokens_in_two_spans(monkeypatch):
    """Few tokens are summed by one program, as the table's figure has it: here 260 shall already make two spans."""
    if not INTERPRETING:
        yield
        return
    from vit_fast.kernels import linear

    monkeypatch.setattr(linear, "PARTIAL_TOKENS", 10)
    linear.split_tokens.cache_clear()
    yield
    linear.split_tokens.cache_clear()
