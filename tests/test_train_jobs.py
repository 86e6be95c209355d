"""The trainer under mpirun: a tokenizer that one rank learns, and a sample at the end, wherever parameters lie."""

from __future__ import annotations

import json
import re
from pathlib import Path

from jobs import finish, mpirun, start

MODEL = {"model_type": "gpt2", "vocab_size": 420, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}

PROGRAM = """
from commlab.train import main
text, model, out = sys.argv[0] + ".txt", sys.argv[0] + ".json", sys.argv[0] + ".out"
flags = ["--data", text, "--model", model, "--output", out, "--tokenizer", "bpe:400", "--batch-size", "12"]
flags += ["--steps", "3", "--eval-batches", "2", "--sample", "40", "--timeout", "60", "--dropout", "0"]
other = f"--strategy allreduce --tokenizer bytes --output {out}.bytes"
for more in ("", "--window off", "--servers 1 --strategy ps", other):
    code = main([*flags, *more.split()])
    say("code", code)
"""


def test_a_tokenizer_and_a_sample(tmp_path: Path) -> None:
    """Parameters in the window, in flat buffers, and on a server; and then bytes. One launch: imports take the time."""
    lines = [f"line {number} of the naïve text, and {number**2} — 东京\n" for number in range(400)]
    (tmp_path / "program.py.txt").write_text("".join(lines))
    (tmp_path / "program.py.json").write_text(json.dumps(MODEL))
    job = finish(start(mpirun(2), PROGRAM, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache")))
    assert job.code == 0, job.output
    assert len(job.said("code")) == 8
    assert all(said.startswith("0") for said in job.said("code")), job.output
    assert job.output.count("tokenizer: learning bpe:400 from the training text") == 1, "then it is in the cache"
    assert len(list((tmp_path / "cache/commlab/tokenizers").iterdir())) == 1
    assert len(re.findall(r"sample: (?:\d+ of )?40 tokens", job.output)) == 4, job.output
    prompts = re.findall(r"  held-out text:\n    \| (.*)\n", job.output)
    assert len(prompts) == 4
    assert all(prompt.startswith("line 380 of the") for prompt in prompts), prompts
    # The same tokens on all ranks and in all ways, or the held-out text would have other bits.
    bits = re.findall(r"after step 3: held-out (.*) bits per byte", job.output)
    assert len(bits) == 4
    assert bits[0] == bits[1] == bits[2] != bits[3]
    assert (tmp_path / "program.py.out/tokenizer.json").exists()
