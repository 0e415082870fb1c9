"""Loading weights draws no bars of the libraries', and leaves their settings as they were."""

import diffusers.utils.logging as diffusers_logging
import pytest
import transformers.utils.logging as transformers_logging
from huggingface_hub.utils import are_progress_bars_disabled

from vipo.generators.loading import without_loading_bars


def _shown() -> list[bool]:
    libraries = [library.is_progress_bar_enabled() for library in (transformers_logging, diffusers_logging)]
    return [*libraries, not are_progress_bars_disabled()]


def test_loading_draws_no_bars_and_a_download_does() -> None:
    transformers_logging.enable_progress_bar()
    assert _shown() == [True, True, True]
    with without_loading_bars():
        assert _shown() == [False, False, True]
    assert _shown() == [True, True, True]


def test_what_was_off_stays_off() -> None:
    transformers_logging.disable_progress_bar()
    try:
        with without_loading_bars():
            assert _shown() == [False, False, False]
        assert _shown() == [False, True, False]
    finally:
        transformers_logging.enable_progress_bar()


def test_what_the_libraries_warn_of_is_vipo_s_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with without_loading_bars():
        transformers_logging.get_logger("transformers.x").warning("a key \x1b[31m of a file")
    diffusers_logging.get_logger("diffusers.x").warning("another key")
    assert [record.name for record in caplog.records] == ["transformers.x", "diffusers.x"]
    assert capsys.readouterr().err == ""
