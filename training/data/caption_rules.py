"""What a vision-language model is asked about a clip, and what is wrong with its answer, if anything."""

import re
from collections.abc import Callable
from typing import NamedTuple

from data.clip_lists import with_id_token


# What CogVideoX was trained on, by its report (arXiv 2408.06072): one long English paragraph per clip
PROMPT = (
    "Describe this video in one paragraph of plain English, of at most {words} words, so that a text-to-video model "
    "could make it again. Say who or what is seen and how it looks; what it does and how it moves, in the order in "
    "which it happens; then the place, the light and the colours; and how the camera frames the scene and moves. "
    "Describe only what can be seen, in the present tense. Begin with the subject itself, not with words such as 'The "
    "video shows', and do not mention a video, images or frames."
)
STILL_NOTE = "It is a single still picture: describe no motion."
FRAMES_NOTE = "The {count} images are frames of the video, in order of time, spread over its {seconds:.1f} seconds."
FILE_NOTE = 'The file is called "{text}"; use that only where it agrees with what is seen.'
CAPTION_NOTE = 'An earlier caption, which may be wrong: "{text}"; use it only where it agrees with what is seen.'
MAX_WORDS = 100  # words of a caption that the prompt asks for, if the limit allows it
WORDS_PER_TOKEN = 0.75  # English words to a T5 token, on the cautious side


class Limit(NamedTuple):
    """The longest caption: `most` of what `count` counts, T5 tokens or words."""

    most: int
    unit: str
    count: Callable[[str], int]
    words: int  # that the prompt asks for: some room is left


class Fault(NamedTuple):
    """What is wrong with an answer, and what is added to the question when it is asked again."""

    what: str
    advice: str


def word_limit(max_tokens: int) -> Limit:
    """For want of a tokenizer: so few words that they hardly ever are more tokens."""
    most = max(1, int(max_tokens * WORDS_PER_TOKEN))
    return Limit(most, "words", lambda text: len(text.split()), words_to_ask_for(max_tokens))


def words_to_ask_for(max_tokens: int) -> int:
    return max(1, min(MAX_WORDS, int(max_tokens * WORDS_PER_TOKEN * 0.8)))


def question(prompt: str, notes: list[str]) -> str:
    return "\n\n".join([prompt, *filter(None, notes)])


# ---------------------------------------------------------------- an answer made a caption

THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\ufeff\ufffd\ud800-\udfff]")
MARKUP = re.compile(r"\*\*|__|^#+ *|^ *[-*\u2022] ", re.MULTILINE)
QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "`": "`"}
THING = (
    r"(?:short |brief |entire |whole |animated |given |provided )*"
    r"(?:video(?: clip| footage| sequence)?|clip|footage|film|scene|sequence|animation|image|images|picture|photo(?:graph)?"
    r"|frames?)(?: sequence)?"
)
VERB = (
    r"(?:shows?|depicts?|features?|captures?|displays?|presents?|portrays?|illustrates?|showcases?|contains?|records?"
    r"|(?:opens|begins|starts) with|is (?:of|about)|consists? of)"
)
# "The video shows", "In this clip, we see", "Here is a caption:"
OPENINGS = re.compile(
    rf"(?:sure|certainly|of course|okay)[,.!:]+ |"
    rf"(?:here(?: i|')s|below is|this is) [^.:]{{0,60}}?(?:caption|description|paragraph)[^.:]{{0,60}}: ?|"
    rf"(?:[\w-]+ )?(?:caption|description|answer): ?|"
    rf"(?:the|this|these|a) {THING} {VERB} (?:us )?(?:that |how )?|"
    rf"(?:this|it) is an? (?:{THING}) (?:of|showing|that {VERB}) |"
    rf"(?:in|throughout|across|over) (?:the|this|these) {THING}(?:, ?| (?=(?:an?|the|we|you|one|there)\b))|"
    rf"(?:we|you|one) (?:can )?(?:see|observe|watch|be shown) |"
    rf"(?:we|you) are shown |"
    rf"it {VERB} ",
    re.IGNORECASE,
)


def as_caption(answer: str) -> str:
    """The answer as one line, without thoughts, markup, quotes around it and openings such as "The video shows"."""
    text = MARKUP.sub("", UNPRINTABLE.sub("", THOUGHT.sub("", answer)))
    text = unquoted(" ".join(text.split()))
    while (opening := OPENINGS.match(text)) and opening.end() < len(text):
        text = unquoted(text[opening.end() :].lstrip(" ,:"))
    return text[:1].upper() + text[1:]


def unquoted(text: str) -> str:
    """Without quotes around all of it; those of a word at each end stay."""
    closing = QUOTES.get(text[:1])
    is_whole = len(text) > 1 and closing == text[-1] and closing not in text[1:-1]
    return text[1:-1].strip() if is_whole else text


# ---------------------------------------------------------------- faults

LIST_ITEM = re.compile(r"^ *(?:[-*\u2022]|\d+[.)]|#+) +\S", re.MULTILINE)
REFUSAL = re.compile(
    r"(?:i'?m |i am )?(?:very |so )?(?:sorry|afraid)\b|i apologi[sz]e|i (?:can(?:not|'?t| not)|could not|couldn'?t|am unable|"
    r"won'?t|do not|don'?t)\b|i'?m (?:unable|not able)|unable to |as an? (?:ai|language model)|unfortunately,? |"
    r"(?:no|there (?:is|are) no) (?:video|image|picture|frame|content)s?\b|please (?:provide|upload|share)|"
    r"it (?:seems|appears|looks like) (?:that )?(?:no|there (?:is|are) no|you)\b",
    re.IGNORECASE,
)
# A phrase of up to 12 words three times in a row. No character fits both halves of a word: that would take for ever
LOOP = re.compile(r"\b((?:[\w']+[^\w']+){1,12}?)(?:\1){2,}", re.IGNORECASE)
# Words that are frequent in one language and rare in the others
FREQUENT = {
    "English": "the a an of and is are in to with on at as its it his her their from by over while then into that",
    "Spanish": "el los las del y en un una que con se su por al hay es esta sobre hacia mientras",
    "French": "le les des du et un une dans en est sur qui avec au aux il elle son sa cette vers",
    "German": "der das und ein eine einen einem einer ist im mit auf den dem von zu sich nach wird",
    "Italian": "il lo gli della di e un una che con si nel nella sul sulla sono questo verso mentre",
    "Portuguese": "o os da do dos e um uma que com se no na em para ao pelo enquanto sobre",
    "Dutch": "de het een en van op met zijn naar wordt aan deze zich voor door",
}
FREQUENT = {language: set(words.split()) for language, words in FREQUENT.items()}
MAX_FOREIGN_LETTERS = 0.1  # share of letters that are not Latin
# What no sentence ends with
OPEN_END = re.compile(
    r"(?:[,;:(\u2013\u2014-]|\b(?:an?|the|and|or|of|with|to|from|as|while|its|their))$", re.IGNORECASE
)


def find_fault(answer: str, is_cut: bool, is_refused: bool, limit: Limit, trigger: str | None) -> Fault | None:
    """What is wrong with an answer as it came; None for one that makes a caption. `is_cut`, `is_refused`: by the
    server's own word.
    """
    caption = as_caption(answer)
    if is_refused or REFUSAL.match(caption):
        return Fault("a refusal", "Nobody has to be identified: describe what is visible, in your own words.")
    if is_cut:
        return Fault("cut off", f"Use at most {limit.words} words, and end with a whole sentence.")
    if len(LIST_ITEM.findall(THOUGHT.sub("", answer))) > 1:
        return Fault("a list", "Answer in one paragraph, without lists or headings.")
    return caption_fault(caption, limit, trigger)


def caption_fault(caption: str, limit: Limit, trigger: str | None) -> Fault | None:
    """What is wrong with a caption, however it came about."""
    if not any(character.isalpha() for character in caption):
        return Fault("empty", "Answer with the description alone.")
    if language := other_language(caption):
        return Fault(f"in {language}", "Answer in English only.")
    if repeats(caption):
        return Fault("repeating", "Say everything once.")
    if (length := limit.count(with_id_token(caption, trigger))) > limit.most:
        return Fault(f"too long ({length} {limit.unit}, {limit.most} fit)", shorter(limit, length))
    if OPEN_END.search(caption):
        return Fault("cut off", "End with a whole sentence.")
    return None


def shorter(limit: Limit, length: int) -> str:
    """Asks for fewer words, in the ratio by which the answer was too long: models overrun what they are asked for."""
    words = max(1, int(limit.words * min(1.0, limit.most / length)))
    return f"That was asked before and the answer was too long: use at most {words} words."


def other_language(caption: str) -> str | None:
    """The language of a caption that is not English, as far as frequent words and letters tell."""
    letters = [character for character in caption if character.isalpha()]
    if sum(character > "\u024f" for character in letters) > MAX_FOREIGN_LETTERS * len(letters):
        return "other letters than Latin"
    words = re.findall(r"[^\W\d_]+", caption.lower())
    counts = {language: sum(word in known for word in words) for language, known in FREQUENT.items()}
    likely = max(counts, key=counts.get)
    return likely if counts[likely] >= 2 and counts[likely] > counts["English"] else None


def repeats(caption: str) -> bool:
    """A phrase three times in a row, or a sentence of four words or more twice."""
    sentences = [" ".join(part.lower().split()) for part in re.split(r"[.!?]+", caption)]
    long = [sentence for sentence in sentences if sentence.count(" ") >= 3]
    return len(set(long)) < len(long) or LOOP.search(f"{caption} ") is not None
