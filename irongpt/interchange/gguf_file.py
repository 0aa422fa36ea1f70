"""`irongpt export RUN FILE.gguf`: a BPE run as one file for llama.cpp, by `gguf`.

llama.cpp's own converter rejects every vocabulary that it does not know, so this writes the file
directly: the architecture gpt2 with the pre-tokenizer qwen2, which is ours, or that of an imported
GPT-2.
"""

from pathlib import Path

from irongpt.config import check
from irongpt.data.tokenizer import BPETokenizer
from irongpt.errors import UserError
from irongpt.files import check_result, replacing, reported
from irongpt.interchange.export import load
from irongpt.interchange.gpt2_layout import transposed


def export_gguf(path: Path, file: Path, which: str = "best", dtype: str = "float32") -> None:
    """Writes a new `file` from the checkpoint `best` or `last` of the run at `path`.

    dtype: that of the matrices, float32 or float16. Raises UserError, and then leaves nothing.
    """
    try:
        import gguf
    except ImportError as e:
        raise UserError("a GGUF file needs the package gguf: pip install gguf") from e
    check_result(file)
    check(not file.exists(), f"{file} exists: choose another file")
    trained = load(path, which)
    model, tokenizer = trained.run.config.model, trained.tokenizer
    if not isinstance(tokenizer, BPETokenizer):
        raise UserError(f"{path} has one token per character, which GGUF has no tokenizer for")
    vocabulary = tokenizer.to_json()["model"]
    writer = gguf.GGUFWriter(None, "gpt2")
    writer.add_name(path.resolve().name.encode(errors="replace").decode())
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(4 * model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_head_count(model.n_head)
    writer.add_layer_norm_eps(1e-5)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_F16 if dtype == "float16" else kinds.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if tokenizer.gpt2 else "qwen2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__))
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([normal] * tokenizer.end + [control])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(tokenizer.end)
    writer.add_eos_token_id(tokenizer.end)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.n_layer)
    for name, t in trained.tensors.items():
        layer, _, kind = name.rpartition(".")
        t = transposed(name, t)
        if dtype == "float16" and t.dim() == 2 and not layer.endswith("wpe"):
            t = t.half()
        writer.add_tensor(f"{names[layer]}.{kind}", t.numpy())
    with reported(f"cannot write {file}", disk=file), replacing(file) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
