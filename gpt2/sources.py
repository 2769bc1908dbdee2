"""Where text comes from."""
from pathlib import Path
from typing import Any
from gpt2.config import CorpusSource
def identify(source: CorpusSource, store: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return source.model_dump(mode="json"), source.model_dump(mode="json")
