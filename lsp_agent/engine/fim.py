"""Fill-in-the-middle: the special tokens by which models know the parts of a prompt."""

QWEN_FIM = {
    "prefix": "<|fim_prefix|>",
    "suffix": "<|fim_suffix|>",
    "middle": "<|fim_middle|>",
    "pad": "<|fim_pad|>",
    "repo_name": "<|repo_name|>",
    "file_sep": "<|file_sep|>",
}
"""The special tokens of fill-in-the-middle in the Qwen families (Hui et al., 2024, section 3.1)."""
