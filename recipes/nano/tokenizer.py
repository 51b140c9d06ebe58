"""nano's own small tokenizer: Qwen2's splitting rule, bytes, and whole words for the fixed prompts.

Every word the two questions use is one token, because the prompt is paid for with every picture. There are no merges: a
piece that is a token is taken whole (`ignore_merges`), any other is spelled in bytes, so every text has a round trip.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vqr1_metric import protocol

# The splitting rule of Qwen2 (single digits, words with their leading blank).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Pieces of replies and of the chat format, as the splitting rule cuts them.
_PIECES = ["<answer", "<think", "</", "answer", "think", ">", ">\n", ">\n\n", "\n\n", "Picture", "user", "assistant"]
_PIECES += ["system", " <", " </", ".</", ".\n", "'s", " (", " -", ".."]


_REASONING = """
 a about above absent acceptable across adequate aliasing all almost also although an and any appear appears are area
areas around artefacts artifacts as at background bad balanced banding barely because becomes been below better
between blocked blocks blockiness blotchy blown blur blurred blurry bright brightness but by camera can cast centre
clear clearly clipped clean colour colours color colors composition compressed compression contrast cool corners crisp
dark darkness deep degraded depth detail detailed details difficult dim discoloured distorted distortion distortions
does dull edge edges evenly excellent exposed exposure extremely face faded faint fair fairly few fine flat focus
foreground free from fuzzy gives good grain grainy gray grey halos has have haze hazy heavy heavily high highlights
highly however image in intact is it its jagged JPEG lack lacking lacks large less level light lighting little looks
loss lost low makes many mild minor moderate moderately more most motion much mostly muted natural nearly no noise
noisy noticeable not obvious object of on only or other out over overall overexposed oversharpened pale parts photo
photograph picture pixelated pixels poor poorly posterised preserved quality quite rather readable reasonable reduced
rendered resolution rich ringing saturated saturation scene score see seen sensor severe severely shadows shake sharp
sharpness shows slight slightly small smeared smooth so soft softness some somewhat spoil spoils still strong strongly
subject texture textures than that the them there they thing this tint to tone tones too turbid under underexposed
uneven uniform unnatural usable vague very visible visibly vivid warm washed weak well where which while whole wide
with without
"""


def _whole_words() -> list[str]:
    """Every piece of the two questions, of the chat format and of the reasoning vocabulary, in a fixed order."""
    splitter = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    texts = [protocol.question(thinking) for thinking in (False, True)]
    pieces = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)] + _PIECES
    for word in _REASONING.split():
        pieces += [" " + word] if word not in ("the", "this", "there", "it") else [" " + word, word.capitalize()]
    pieces += ["No", "Some", "Strong", "Slight", "Good", "Poor", "Sharp", "Blurred", "Noisy", "Colours", "Overall"]
    return [piece for piece in dict.fromkeys(pieces) if len(piece.encode()) > 1]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`; deterministic."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = ["".join(part for part, _ in to_bytes.pre_tokenize_str(word)) for word in _whole_words()]
    vocabulary = {token: index for index, token in enumerate(alphabet + encoded)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
