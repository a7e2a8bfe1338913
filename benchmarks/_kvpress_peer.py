"""The peer of eviction_quality: kvpress, in an environment of its own, because it needs an older `transformers`.

It runs as a script there and imports nothing of ours. It reads one JSON object {"model", "dtype", "threads", "jobs":
[{"press", "share", "case", "context", "question", "answer"}]} from stdin, and for each job prints one line {"policy",
"share", "case", "is_exact", "log_likelihood", "num_slots"}. As its pipeline does, a press compresses after the whole
context's prefill, and the question has the positions behind it.
"""

import importlib.metadata
import json
import sys

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


@torch.inference_mode()
def main() -> None:
    """Answer all jobs, one after the other."""
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"])).eval()
    version = importlib.metadata.version("kvpress")
    for job in given["jobs"]:
        press = getattr(kvpress, job["press"])(compression_ratio=1 - job["share"])
        cache = DynamicCache()
        with press(model):
            model.model(input_ids=torch.tensor([job["context"]]), past_key_values=cache)
        num_slots = cache.get_seq_length()
        question, answer, num_tokens = job["question"], torch.tensor(job["answer"]), len(job["context"])
        asked = torch.tensor([[*question, *job["answer"][:-1]]])
        positions = torch.arange(num_tokens, num_tokens + asked.shape[1])[None]
        logits = model(input_ids=asked, past_key_values=cache, position_ids=positions).logits[0, len(question) - 1 :]
        log_probs = logits.float().log_softmax(dim=-1)
        result = {
            "policy": f"kvpress/{version}/{job['press']}",
            "share": job["share"],
            "case": job["case"],
            "is_exact": bool((log_probs.argmax(dim=-1) == answer).all()),
            "log_likelihood": float(log_probs.gather(1, answer[:, None]).sum()),
            "num_slots": num_slots,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
