"""The pretrained stage: weights that others trained, fetched and verified, to be measured as ours are.

    python -m gpt2.pretrained DIRECTORY

The evaluate stage does the measuring; `gpt2.plan.plan_baseline` puts the two together.
"""

from __future__ import annotations

from gpt2.download.sources import MODEL_FORMATS, fetch, known_sha256
from gpt2.download.stage import DownloadProgress, origin
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import PretrainedFacts

MODEL = "model"


def work(stage: StageDir) -> None:
    """Fetch the files and give them, under model/, the names that Hugging Face's loaders look for."""
    identity, hints = stage.request.config["source"], stage.request.hints["source"]
    with DownloadProgress(stage.metrics()) as report:
        files = fetch(
            identity,
            hints,
            stage.path,
            workers=stage.runtime.download_workers,
            progress=report,
            text_formats=MODEL_FORMATS,
        )
    sha256 = known_sha256(identity, stage.path)
    (stage.path / MODEL).mkdir(exist_ok=True)
    links = {f"{MODEL}/{file.split('/')[-1].partition('-')[2]}": file for file in files}  # data/00001-model.safetensors
    for name, file in links.items():
        (stage.path / name).unlink(missing_ok=True)
        (stage.path / name).symlink_to(f"../{file}")
    sha256 |= {name: sha256[file] for name, file in links.items() if file in sha256}
    facts = PretrainedFacts(origin=origin(identity, hints), checkpoint=MODEL)
    stage.finish([*files, *links], facts, sha256=sha256)
    print(f"pretrained: {facts.origin}", flush=True)
