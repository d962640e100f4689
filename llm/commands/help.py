"""Builds the page that `--help` prints: each group, each option with one line, and examples."""

from pathlib import Path

import yaml

EXAMPLES = {
    "train": """\
Examples
  python train.py                                        train on this Python's own sources
  python train.py model/size=small data=text data.files='corpus/*.txt' max_steps=2000
  python train.py -m optimizer=adamw optimizer.lr=1e-3,3e-3 seed=1,2

  python train.py plan=true model/size=124m              print parameters, memory and FLOPs
  python train.py resume=runs/<folder>                   resume a run
""",
    "eval": """\
Examples
  python eval.py run_dir=runs/<folder>
  python eval.py run_dir=runs/<folder> 'eval=[loss,extrapolation]' model/position=rerope model.position.window=128
  python eval.py 'run_dir=[runs/a,runs/b]' 'eval=[loss,attention]'                     compare two runs in one table
  python eval.py run_dir=runs/<folder> 'eval=[lm_eval]' 'eval.lm_eval.tasks=[lambada_openai]'
""",
}


def help_page(config_dir: Path, config_name: str) -> str:
    """Return the help text of the configuration in `config_dir`, read from the first comment of each file."""
    lines = [
        _first_comment(config_dir / f"{config_name}.yaml"),
        "",
        f"Usage: python {config_name}.py [key=value …] [-m]",
        "",
    ]
    lines += ["Run-level keys", *_run_keys(config_dir / f"{config_name}.yaml"), ""]
    if config_name == "train":
        lines += ["Settings of a sweep, with -m", *_sweep_keys(config_dir / "sweep.yaml"), ""]
    lines += [
        "Groups: choose with <group>=<option>, change a value inside with <group>.<key>=<value>; * is the default"
    ]
    defaults = _chosen(config_dir, f"{config_name}.yaml", "")
    everything = sorted(p for p in config_dir.rglob("*") if p.is_dir() and list(p.glob("*.yaml")))
    own = {config_dir / name for name in _groups(config_dir / f"{config_name}.yaml")}
    for folder in everything if config_name == "train" else [p for p in everything if p in own]:
        lines += ["", f"  {folder.relative_to(config_dir).as_posix()}"]
        chosen = defaults.get(folder.relative_to(config_dir).as_posix(), ())
        for file in sorted(folder.glob("*.yaml")):
            mark = "*" if file.stem in chosen else " "
            lines.append(f"  {mark} {file.stem:<14} {_first_comment(file)}")
    return "\n".join([*lines, "", EXAMPLES[config_name]])


def _groups(file: Path) -> set[str]:
    """Return the groups that a configuration's defaults list names."""
    entries = yaml.safe_load(file.read_text()).get("defaults", [])
    return {name.removeprefix("optional ") for entry in entries if isinstance(entry, dict) for name in entry}


def _chosen(config_dir: Path, file: str, group: str) -> dict[str, tuple[str, ...]]:
    """Return the default options of each group, following the defaults lists."""
    entries = (yaml.safe_load((config_dir / group / file).read_text()) or {}).get("defaults", [])
    chosen: dict[str, tuple[str, ...]] = {}
    for name, option in (pair for entry in entries if isinstance(entry, dict) for pair in entry.items()):
        path = f"{group}/{name}".lstrip("/")
        if isinstance(option, list):
            chosen[path] = tuple(option)
        elif option and "@" not in name and (config_dir / path / f"{option}.yaml").is_file():
            chosen |= {path: (option,), **_chosen(config_dir, f"{option}.yaml", path)}
    return chosen


def _first_comment(file: Path) -> str:
    comments = (line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    return next((c for c in comments if not c.startswith("@package")), "")


def _run_keys(file: Path) -> list[str]:
    return _settings(file.read_text().split("\n\n", 1)[1].split("\nloader:")[0].split("\nhydra:")[0])


def _sweep_keys(file: Path) -> list[str]:
    return _settings(file.read_text(), prefix="sweep.")


def _settings(body: str, prefix: str = "") -> list[str]:
    rows = []
    for line in body.splitlines():
        if ":" not in line or line.startswith((" ", "#", "defaults")):
            continue
        setting, _, comment = line.partition("#")
        rows.append(f"  {prefix + setting.strip().replace(': ', '='):<28} {comment.strip()}".rstrip())
    return rows
