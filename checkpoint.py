"""Weights on disk.  Ours is a folder with three files:

    model.safetensors    tensors under "mmdit." and, in the end-to-end variant, "embedding."
    config.json          {"format": ..., "mmdit": MMDiTConfig, "latents": "pixels", "pixels": 32, ...}
    tokenizer.json       {"tokenizer": "gpt2", "keep": null or the GPT-2 ids that are kept}

All reading is strict: a tensor that is missing, left over, misshapen or not finite is an error that names it.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data import Tokenizer, UserError, gpt2_tokenizer
from model import MMDiT, MMDiTConfig, TokenEmbedding
from vae import Pixels

FORMAT = "dual-diffusion-transformer"


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint is a folder with config.json, model.safetensors "
                        f"and tokenizer.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_config(path: str | Path) -> dict:
    """config.json of a checkpoint folder, with "mmdit" as an MMDiTConfig.  Raises UserError, naming the file."""
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise UserError(f"{path}: expected a checkpoint folder, found {found}")
    config = read_json(path / "config.json")
    if config.get("format") != FORMAT or not isinstance(config.get("mmdit"), dict):
        raise UserError(f"{path / 'config.json'}: expected \"format\": \"{FORMAT}\", found {config.get('format')!r}")
    known = {f.name for f in fields(MMDiTConfig)}
    if unknown := sorted(set(config["mmdit"]) - known):
        raise UserError(f"{path / 'config.json'}: unknown sizes {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return config | {"mmdit": MMDiTConfig(**config["mmdit"])}


def fill(module: nn.Module, file: Path, prefix: str, dtype: torch.dtype) -> None:
    """Put the tensors of `file` under `prefix` into a module built on the meta device, one at a time.

    Raises UserError with every missing, left-over, misshapen or non-finite tensor in one message.
    """
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
    problems, state = [], {}
    try:
        with safe_open(file, framework="pt") as tensors:
            held = {k.removeprefix(prefix): k for k in tensors.keys() if k.startswith(prefix)}
            problems += [f"{prefix}{k} is missing" for k in wanted if k not in held]
            problems += [f"{prefix}{k} is not a part of this model" for k in held if k not in wanted]
            for name in wanted.keys() & held.keys():
                shape = tuple(tensors.get_slice(held[name]).get_shape())
                if shape != wanted[name]:
                    problems.append(f"{prefix}{name} is {shape}, config.json asks for {wanted[name]}")
                    continue
                state[name] = tensors.get_tensor(held[name]).to(dtype)
                if not state[name].isfinite().all():
                    problems.append(f"{prefix}{name} holds NaN or infinity")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again")
    if problems:
        shown = "; ".join(sorted(problems)[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(f"{file}: {shown}")
    module.load_state_dict(state, assign=True)


def load_mmdit(path: str | Path, dtype: torch.dtype = torch.float32) -> MMDiT:
    """The transformer of a checkpoint folder, in eval mode, on the CPU."""
    config = read_config(path)["mmdit"]
    try:
        with torch.device("meta"):
            model = MMDiT(config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{Path(path) / 'config.json'}: no model has these sizes ({error})")
    fill(model, Path(path) / "model.safetensors", "mmdit.", dtype)
    with torch.device("cpu"):      # the position table is not stored: it is a function of the sizes
        from model import position_table
        model.positions = position_table(config.width, config.position_size, config.position_base).to(dtype)
    return model.eval()


def load_embedding(path: str | Path, dtype: torch.dtype = torch.float32) -> TokenEmbedding:
    """The end-to-end variant's token embedding, in eval mode.  Raises UserError where text comes from T5."""
    config = read_config(path)["mmdit"]
    if not config.text_length:
        raise UserError(f"{path}: this checkpoint has no token embedding of its own (text_length is 0)")
    with torch.device("meta"):
        embedding = TokenEmbedding(config.vocab_size, config.text_length, config.text_width)
    fill(embedding, Path(path) / "model.safetensors", "embedding.", dtype)
    return embedding.eval()


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> Pixels:
    """What turns pictures into this checkpoint's latents and back."""
    kind = read_config(path).get("latents")
    if kind != "pixels":
        raise UserError(f"{Path(path) / 'config.json'}: \"latents\" is {kind!r}; \"pixels\" is what can be read")
    return Pixels()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """"gpt2", or the tokenizer of a checkpoint folder (its tokenizer.json)."""
    if str(path) == "gpt2":
        return gpt2_tokenizer()
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    content = read_json(path)
    if content.get("tokenizer") != "gpt2":
        raise UserError(f"{path}: expected \"tokenizer\": \"gpt2\", found {content.get('tokenizer')!r}")
    return gpt2_tokenizer(content.get("keep"))


def save(folder: Path, tensors: dict[str, Tensor], mmdit: MMDiTConfig, keep: list[int] | None,
         dtype: torch.dtype = torch.float32, **more) -> None:
    """Write a checkpoint folder of ours; `more` goes into config.json.  Each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    config = {"format": FORMAT, "mmdit": asdict(mmdit), "latents": "pixels"} | more
    writers = {"model.safetensors": lambda to: save_file(tensors, to),
               "config.json": lambda to: to.write_text(json.dumps(config, indent=1) + "\n"),
               "tokenizer.json": lambda to: to.write_text(json.dumps({"tokenizer": "gpt2", "keep": keep}) + "\n")}
    for name, write in writers.items():
        temporary = folder / f".{name}.tmp"
        write(temporary)
        temporary.replace(folder / name)
