"""A stand-in for a teacher's vLLM server, in this process."""

import json

import httpx
import torch
from safetensors.torch import load_file

from training.batches import Batch

VISIBLE = 257  # of the byte tokenizer of conftest.py
BATCH = Batch.of([[5, 6], [7]], [[1, 2], [3, 256]], pad=256)


class VLLM:
    """Answers as a vLLM server of `model` does if the vocabulary has only the visible ids."""

    def __init__(self, model):
        self.model, self.asked, self.weights = model, [], None

    def __call__(self, request):
        body = json.loads(request.content or b"{}")
        self.asked.append((request.url.path, body))
        return httpx.Response(200, json=getattr(self, request.url.path.strip("/").replace("/", "_"))(body))

    def v1_models(self, body):
        return {"data": [{"id": "big"}]}

    def v1_completions(self, body):
        choices = []
        for index, row in enumerate(body["prompt"]):
            choice = {"index": index, "token_ids": [65, 66, 256]}
            if top := body.get("prompt_logprobs"):
                choice["prompt_logprobs"] = [None, *self.prompt_logprobs(row, top)]
            choices.append(choice)
        return {"choices": choices[::-1]}  # vLLM does not promise their order

    @torch.no_grad()
    def prompt_logprobs(self, row, top):
        log_p = self.model(torch.tensor([row])).logits[0, :, :VISIBLE].log_softmax(-1)
        for at, own in enumerate(row[1:]):
            ids = {*log_p[at].topk(top).indices.tolist(), own}
            yield {str(i): {"logprob": log_p[at, i].item()} for i in ids}

    def collective_rpc(self, body):
        self.weights = load_file(f"{body['kwargs']['weights_path']}/model.safetensors")
        return {"results": [None]}

    def reset_prefix_cache(self, body):
        return {"success": True}


def client(handler):
    return httpx.Client(transport=httpx.MockTransport(handler))
