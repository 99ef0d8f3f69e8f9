"""Makes golden_hf.npz from transformers: `python tests/engine/golden/make_golden_hf.py` where torch is installed.

Of each config in `tiny_hf.CONFIGS`: the names and shapes of the checkpoint as transformers saves it, logits of some
positions of the prompt, tokens decoded greedily, and the experts that the first tokens were routed to.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tiny_hf import CONFIGS, random_weights, write_hf_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

PROMPT, GREEDY, ROUTED = 40, 16, 2
POSITIONS = [0, 1, 2, 3, 10, 20, 36, 37, 38, 39]


def main() -> None:
    torch.set_num_threads(1)
    prompt = np.random.RandomState(3).randint(0, 256, PROMPT)
    arrays = {"prompt": prompt, "positions": np.array(POSITIONS)}
    for name, values in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = AutoConfig.for_model(**values)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            saved = json.loads((Path(folder) / "config.json").read_text())
            with safe_open(Path(folder) / "model.safetensors", "np") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a dict
            write_hf_checkpoint(Path(folder), saved, random_weights(shapes, saved))
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values()), info
        routed = []
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda _, __, output, found=routed: found.append(output[2]))
        model.eval()
        ids = prompt.tolist()
        with torch.no_grad():
            model(torch.tensor([ids[:ROUTED]]), use_cache=False)
            if routed:
                arrays[f"{name}.routed"] = torch.stack(routed).numpy().astype(np.uint8)
            arrays[f"{name}.logits"] = model(torch.tensor([ids]), use_cache=False).logits[0, POSITIONS].numpy()
            for _ in range(GREEDY):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        arrays[f"{name}.greedy"] = np.array(ids[PROMPT:])
        arrays[f"{name}.checkpoint"] = np.array(json.dumps({"config": saved, "shapes": shapes}))
        print(name, len(shapes), "tensors, logits", np.abs(arrays[f"{name}.logits"]).max())
    np.savez_compressed(Path(__file__).with_name("golden_hf.npz"), **arrays)


if __name__ == "__main__":
    main()
