"""llama.cpp as a peer: a Llama written as GGUF, and the C calls of llama-cpp-python."""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .work import STRIDE, Call, Work


def write_gguf(model: Any, path: str | os.PathLike[str], dtype: str) -> None:
    """Write a dense transformers Llama as GGUF without a vocabulary.

    Args:
        model: a ``LlamaForCausalLM``.
        path: of the file.
        dtype: of the matrices: ``"fp32"``, ``"bf16"`` or ``"int8"`` (Q8_0).
    """
    import gguf

    types = gguf.GGMLQuantizationType
    kind = {"fp32": types.F32, "bf16": types.BF16, "int8": types.Q8_0}[dtype]
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        value = parameter.detach().float()
        if ".q_proj." in name or ".k_proj." in name:
            value = _interleaved(value, config.head_dim)
        stored = kind if value.dim() == 2 else types.F32
        data = gguf.quants.quantize(value.numpy(), stored)
        key = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(key, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows from rotary halves, as transformers pairs them, to llama.cpp's neighbours."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


class LlamaCpp:
    """A model file in llama.cpp, ready for one kind of work at a number of threads."""

    def __init__(self, path: str | os.PathLike[str], work: Work, threads: int) -> None:
        import llama_cpp

        self._c, self._work = llama_cpp, work
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, None)
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(path), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        prompt = work.batch * work.length
        settings.n_ctx = work.batch * (work.length + STRIDE)
        settings.n_batch = settings.n_ubatch = max(prompt, 32)
        settings.n_seq_max = work.batch
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError(f"llama.cpp can't open {os.fspath(path)!r}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(prompt, 0, 1)
        weakref.finalize(self, _free, self._batch, self._context, self._model)

    def call(self, vocabulary: int) -> Call:
        """Return a call that does the work and returns the logits [batch, vocabulary]."""
        ids = self._work.ids(vocabulary)
        length = self._work.length

        def prefill() -> Tensor:
            self._keep(0)
            return self._run(ids[:, :length], 0, vocabulary)

        if self._work.kind == "prefill":
            return prefill
        prefill()
        place = length

        def step() -> Tensor:
            nonlocal place
            if place == length + STRIDE:
                self._keep(length)
                place = length
            place += 1
            return self._run(ids[:, place - 1 : place], place - 1, vocabulary)

        return step

    def _keep(self, length: int) -> None:
        """Forget what follows the first ``length`` tokens of every sequence."""
        for sequence in range(self._work.batch):
            self._c.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def _run(self, ids: Tensor, start: int, vocabulary: int) -> Tensor:
        batch, length = self._batch, ids.shape[1]
        batch.n_tokens = ids.numel()
        for i, token in enumerate(ids.flatten().tolist()):
            batch.token[i], batch.pos[i] = token, start + i % length
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // length
            batch.logits[i] = i % length == length - 1
        status = self._c.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama.cpp failed with status {status}")
        rows = []
        for i in range(length - 1, ids.numel(), length):
            pointer = self._c.llama_get_logits_ith(self._context, i)
            rows.append(np.ctypeslib.as_array(pointer, (vocabulary,)).copy())
        return torch.from_numpy(np.stack(rows))


def _free(batch: Any, context: Any, model: Any) -> None:
    import llama_cpp

    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
