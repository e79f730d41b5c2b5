"""The snapshot that this node's engine reads of a model named by its Hugging Face id.

Each node has a cache of its own, and a branch may move between two downloads: the commit that the worker's node found
is the one that its ranks on other nodes load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from megatoken.errors import RequestError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FROM_THE_HUB: Final = ("auto", "hf", "safetensors", "fastsafetensors", "mistral", "pt", "npcache")


def snapshot_of(config: VllmConfig) -> Path | None:
    """The directory, with all that vLLM will load in it; pins `config` to its commit.

    None for weights that do not come from files of the hub, e.g. load_format dummy. Blocks while it downloads. Raises
    RequestError where the node has not the model and the hub does not give it.
    """
    from huggingface_hub import snapshot_download
    from vllm.model_executor.model_loader import get_model_loader

    model, loading = config.model_config, config.load_config
    if Path(model.model).is_absolute():  # with HF_HUB_OFFLINE vLLM puts the snapshot in the id's place
        return Path(model.model)
    if loading.load_format not in FROM_THE_HUB:
        return None
    try:
        get_model_loader(loading).download_model(model)
        where = {"revision": model.revision, "cache_dir": loading.download_dir}
        found = Path(snapshot_download(model.model, **where, local_files_only=True, ignore_patterns="*"))
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError("source", model.model, f"a model that this node has or can download: {reason}") from error
    if model.tokenizer == model.model and model.tokenizer_revision == model.revision:
        model.tokenizer_revision = found.name
    model.revision = found.name
    return found
