"""Put a trained adapter into the package, for the demo: of the packaged LM, or of SmolLM2 (``--pretrained``).

    qpeft compare benchmarks/quality/quality.yaml --data-root DATA --output build/quality/test \\
        --collection docstrings --method "Q-PEFT-R + generated LoRA, 2560"
    python benchmarks/quality/package_adapter.py FOLDER   # FOLDER: build/quality/test/docstrings/…/seed-0

    qpeft compare benchmarks/quality/choose_pretrained.yaml --data-root DATA --output build/quality/choose_pretrained \\
        --collection docstrings --method "Q-PEFT-R + generated LoRA, 1e-3"
    python benchmarks/quality/package_adapter.py --pretrained FOLDER --data DATA/quality/docstrings-a
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qpeft_ext import QPeftModel
from qpeft_ext.demo.adapters import ADAPTER, PRETRAINED_ADAPTER
from qpeft_ext.demo.choice import PRETRAINED
from qpeft_ext.lm.loading import BASE_LM, load_lm, load_tokenizer

DEMO = 'demo = Path(qpeft.__file__).parent / "demo"'
RECIPE = "config", "training", "dtype"  # of the result's settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="folder of a result of `qpeft compare`")
    parser.add_argument("--pretrained", action="store_true", help="for SmolLM2; weights are stored in bfloat16")
    parser.add_argument("--data", type=Path, help="folder of the training data, with versions.json")
    given = parser.parse_args()
    name, folder = (PRETRAINED, PRETRAINED_ADAPTER) if given.pretrained else (str(BASE_LM), ADAPTER)
    lm, tokenizer = load_lm(name, dtype="float32"), load_tokenizer(name)
    model = QPeftModel.from_pretrained(given.result / "adapter", lm, tokenizer, is_trainable=True)
    # where the packaged LM lies differs from machine to machine
    model.qpeft_config.base_model_name_or_path = name if given.pretrained else BASE_LM.name
    model.save_pretrained(folder)
    card = folder / "README.md"
    text = placed(card.read_text(encoding="utf-8"), folder, None if given.pretrained else BASE_LM)
    card.write_text(text, encoding="utf-8")
    if given.pretrained:
        weights = folder / "adapter_model.safetensors"
        halves = {key: value.to(torch.bfloat16) for key, value in load_file(weights).items()}
        save_file(halves, weights, metadata={"format": "pt"})
        settings = json.loads((given.result / "settings.json").read_text())
        recipe = {key: settings[key] for key in RECIPE} | {
            "trained": json.loads((given.result / "trained.json").read_text())
        }
        if given.data:
            recipe["packages"] = json.loads((given.data / "versions.json").read_text())["versions"]
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")


def placed(card: str, folder: Path, lm: Path | None) -> str:
    """Make a model card load the adapter, and the LM if that is packaged too, from where the package has them."""
    places = f'demo / "{folder.name}"' + ("" if lm is None else f', base_model=demo / "{lm.name}"')
    card = card.replace(
        "import qpeft_ext as qpeft\n", f"from pathlib import Path\n\nimport qpeft_ext as qpeft\n\n{DEMO}\n"
    )
    return (
        card.replace("\n\nreranker =", "\nreranker =")
        .replace('"this-folder"', places)
        .replace(f"base_model: {BASE_LM.name}\n", "")
    )


if __name__ == "__main__":
    main()
