"""`pikv generate`: continue a text."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import (
    CACHES,
    DeviceMap,
    Dtype,
    Model,
    Probe,
    distinct,
    err,
    fail,
    load,
    one_sentence,
    out,
    parse_caches,
)

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

EPILOG = CACHES


def generate_command(
    prompt_file: Annotated[
        typer.FileText, typer.Option(encoding="utf-8", help="Prompt file; - for standard input.")
    ],
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    cache: Annotated[str | None, typer.Option(help="The cache to use. Default: lossless.")] = None,
    compressor: Annotated[str | None, typer.Option(help="Short for --cache compressor=...")] = None,
    probe: Probe = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the chat template to the prompt.")
    ] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Continue the text of a file greedily, and report what the cache holds afterwards."""
    from transformers import TextStreamer

    from ..model.loading import encode, generate
    from ..model.versions import cache_in

    if cache is not None and compressor is not None:
        fail("--cache and --compressor: only one of them can be given.")
    named = parse_caches([cache] if cache else [], [compressor] if compressor else [])
    option = distinct(named or parse_caches(["lossless"]), probe)[0]
    text = _read(prompt_file)
    loaded, tokenizer = load(model, dtype, device_map)
    text = _as_chat(tokenizer, text) if chat else text
    with one_sentence():
        made = option.make(loaded)
    inputs = encode(loaded, tokenizer, text, special_tokens=not chat)
    if not inputs["input_ids"].numel():
        fail("the prompt has no tokens.")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with one_sentence():
            result = generate(loaded, inputs, made, streamer, max_new_tokens)
    except KeyboardInterrupt:
        err.print("\nInterrupted.")
        _report(made)
        raise typer.Exit(130) from None
    _report(cache_in(result) if made is None else made)


def _read(file: Any) -> str:
    try:
        text = file.read()
    except UnicodeDecodeError:
        fail("--prompt-file is not UTF-8 text.")
    if not text.strip():
        fail("--prompt-file is empty.")
    return text


def _as_chat(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    if tokenizer.chat_template is None:
        fail("--chat: the tokenizer of this model has no chat template.")
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)  # one conversation, not tokenized
    return prompt


def _report(cache: "Cache | None") -> None:
    from ..cache.pikv_cache import PiKVCache
    from ..needles.trials import held_bytes

    if isinstance(cache, PiKVCache):
        out.print(cache.report())
    elif cache is not None:
        held = f"{held_bytes(cache) / 2**20:.2f} MiB"
        out.print(f"{type(cache).__name__}: {cache.get_seq_length()} tokens seen, {held}")
