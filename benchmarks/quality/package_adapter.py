"""Put a trained adapter of the packaged LM into the package, for the demo.

    qpeft compare benchmarks/quality/quality.yaml --data-root DATA --output build/quality/test \\
        --collection docstrings --method "Q-PEFT-R + generated LoRA, 2560"
    python benchmarks/quality/package_adapter.py FOLDER/adapter   # FOLDER: build/quality/test/docstrings/…/seed-0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qpeft_ext import QPeftModel
from qpeft_ext.demo.adapters import ADAPTER
from qpeft_ext.lm.loading import BASE_LM, load_lm, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    adapter = parser.parse_args().adapter
    name = str(BASE_LM)
    lm, tokenizer = load_lm(name, dtype="float32"), load_tokenizer(name)
    model = QPeftModel.from_pretrained(adapter, lm, tokenizer, is_trainable=True)
    model.qpeft_config.base_model_name_or_path = BASE_LM.name  # where the LM lies differs from machine to machine
    model.save_pretrained(ADAPTER)
    for path in ADAPTER.iterdir():
        path.chmod(0o644)
    print(f"{ADAPTER}: {sum(path.stat().st_size for path in ADAPTER.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
