"""Both ways to multiply integers, whatever this processor can do."""

import pytest

from msquant.inference.cpu import onednn


@pytest.fixture(params=["onednn", "widened"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers built in the test use oneDNN's kernel, or float32."""
    if request.param == "widened":
        monkeypatch.setattr(onednn, "load_int8", lambda: None)
    elif onednn.load_int8() is None:
        pytest.skip("this processor has no exact int8 instructions")
    return str(request.param)
