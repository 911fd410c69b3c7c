"""llama.cpp's log-probabilities of every token after every prefix; runs in a place of its own.

Reads a task as JSON on standard input (model, windows, texts, threads, out) and writes the
log-probabilities to ``out`` (npy, windows x tokens x vocabulary, float32); prints its version and
its tokens of the texts. The server is asked in this process; weights are multiplied as it does by
default, keys and values are kept in float32.
"""

from __future__ import annotations

import http.client
import json
import sys
import urllib.parse

import numpy as np
import xllamacpp


def main() -> None:
    task = json.load(sys.stdin)
    server = _serve(task)
    windows = task["windows"]
    shape = (len(windows), len(windows[0]), task["vocab_size"])
    logprobs = np.full(shape, np.nan, np.float32)
    for row, window in enumerate(windows):
        for column in range(len(window)):
            ids, values = _next_token(server, window[: column + 1], task["vocab_size"])
            logprobs[row, column, ids] = values
    np.save(task["out"], logprobs)
    tokens = [_tokenize(server, text) for text in task["texts"]]
    print(json.dumps({"tokens": tokens, "built": xllamacpp.BUILD_INFO}, default=str))


def _serve(task: dict) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _next_token(
    server: xllamacpp.Server, prefix: list[int], vocab_size: int
) -> tuple[list[int], list[float]]:
    answer = server.handle_completions(
        {
            "prompt": prefix,
            "n_predict": 1,
            "n_probs": vocab_size,
            "temperature": 0.0,
            "cache_prompt": True,
        }
    )
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [each["id"] for each in found], [each["logprob"] for each in found]


def _tokenize(server: xllamacpp.Server, text: str) -> list[int]:
    address = urllib.parse.urlparse(server.listening_address)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    body = json.dumps({"content": text, "add_special": False, "parse_special": True})
    connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())["tokens"]


if __name__ == "__main__":
    main()
