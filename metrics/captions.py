"""Score captions against reference captions by people: BLEU, ROUGE-L and CIDEr-D as COCO's
evaluation computes them.

    references, names, left_out = captions.read_captions(Path("captions_val2014.json"))
    written, repeated = captions.read_results(Path("results.json"))
    scores, unscored = captions.score(references, written)

The scores equal those of the package pycocoevalcap (COCO caption evaluation, arXiv 1504.00325) and
are not in percent: BLEU and ROUGE-L go from 0 to 1, CIDEr-D from 0 to 10, with about 1 for a good
captioner.  The package's METEOR and SPICE are Java programs with data files, and not implemented.

An id is an image's id, an int or a str.  Words are the lower-case results of `tokens`.
"""

import html
import math
import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from common.cli import require
from common.files import read_json, read_json_lines, read_text
from dataset.sources import identity, text

References = dict[int | str, list[str]]     # an image's id -> its reference captions
Texts = dict[int | str, str]                # an image's id -> a text

ORDERS = range(1, 5)            # the k of k-grams
BETA = 1.2                      # ROUGE-L's weight of recall
SIGMA = 6.0                     # CIDEr-D's tolerance of different lengths
NAMES = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
ASCII = str.maketrans({
    **dict.fromkeys("‘’‛‹›", "'"), **dict.fromkeys("“”«»", '"'), **dict.fromkeys("–—―", "--"),
    "…": "...",
    "£": "#", "€": "$", "¢": " cents ", "¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "\xad": ""})
BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-",
                          "}": "-rcb-"})
# words that keep their full stop: SHORT always, STATES with a capital, COUNTED before a number
SHORT = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros
    calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec esq
    est etc ext feb fla fri ft ga gen gov govs hon inc ind intl jan jos jr jul jun kan kans ky
    lieut lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms mt natl neb nev nov oct
    okla penn pfc ph plc pres prof pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr
    st ste supt supts tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo""".split()
STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
COUNTED = "art ca figs? nos? op pp prop".split()
# words that begin a sentence: a letter and full stop before them end another ("plan B. The ...")
STARTS = "The|An?|In|At|It|He|She|They|We|This|There"
L = r"[^\W\d_]"                                             # a letter
W = r"[^\W_]"                                               # a letter or digit
CLITIC = rf"(?:n't|'(?:s|m|d|re|ve|ll))(?!{L})"
TOKEN = re.compile(rf"""(?i:
      (?:https?://|www\.)\S+?(?=[.,!?;:'")]*(?:\s|$))       # what is in the web
    | \w[\w.+-]*@\w[\w-]*(?:\.\w+)*  |  [@#]{L}\w*
    | </?{L}[^\s<>]*>  |  [:;=]-?(?:[()]|[dp](?!{W}))
    | {CLITIC}  |  {L}+?(?=n't(?!{L}))                      # it 's, ca n't
    | can(?=not\b) | got(?=ta\b) | (?:gon|wan)(?=na\b) | (?:lem|gim)(?=me\b) | 't(?=(?:is|was)\b)
    | (?<!{W})'\d\ds?(?![\w'])  |  'n'  |  '(?:em|til|cause|n)(?!{W})      # the '80s, rock 'n' roll
    | (?:ma'am|c'mon|li'l|s'mores|ol'|somethin')(?!{W})  |  y'(?={L})  |  [dlno](?!{CLITIC})'{L}+
    | (?:{L}(?:\.{L})+|ph\.d)\.(?!{L})(?:-{W}+)*             # u.s.a. and a.m.
    | {L}{W}*(?:[.!?]{L}{W}*)+(?:-{W}+)*                    # no space between sentences
    | (?:{"|".join(SHORT)})\.(?!{L})  |  (?:{"|".join(COUNTED)})\.(?=\s?\d)  |  {W}+\.(?=[,;:])
    )
    | (?:{"|".join(STATES)})\.(?!{L})  |  {L}\.(?!{L})(?!\s*$|\s+(?:{STARTS})\b)
    | [A-Z]+(?:&[A-Z]+)+                                    # R&B, but b & b
    | (?:[-+]?(?:\d+|(?<!\.))(?:[.:,]\d+)+|[-+]\d+)(?:-{L}{W}*)*      # 1,000.50, 3:30, 2.5-inch
    | {W}+(?:[-‑/_]{W}+)*                                   # words: t-shirt, and/or, 1/2
    | [!?]{{2,}} | \*+ | \#+ | _+ | @+ | << | >>
    | [^\w\s.,:;'"`!?\-\x00-\x1f\x7f-\x9f\u200b-\u200f\ufe0f\ufeff\U00010000-\U0010ffff]""",
    re.VERBOSE)


def tokens(caption: str) -> list[str]:
    """Return the lower-case words of an English text.

    COCO's evaluation makes them with Stanford's PTBTokenizer 3.4.1 (-preserveLines -lowerCase) and
    a list of punctuation to leave out; this function needs no Java.

    "Don't!" becomes do n't; "gonna", gon na; "the dogs' U.S. T-shirt", the dogs u.s. t-shirt.
    Quotes, full stops, commas, colons, dashes and a single ! or ? are left out.  "!!" is a word,
    and brackets are kept as -lrb- and -rrb-: the list has these in capitals, which never occur.

    experiments/compare_captions.py counts the differences from Stanford's tokenizer.  Here names
    with an apostrophe are split (Hawai'i, Po'Boy), as are c++, \\o/, "2.x" and "<a tag>"; (555) is
    three words; a third slash joins words, too; accents are composed; marks on letters of other
    scripts are not handled.  A letter with a full stop at the end of a caption loses the full stop;
    Stanford's does this only if the next caption begins with a word like "A"."""
    caption = re.sub("&(amp|lt|gt|quot|apos|nbsp);", lambda match: html.unescape(match[0]), caption)
    caption = unicodedata.normalize("NFC", caption).translate(ASCII)
    return [word.translate(BRACKETS).lower() for word in TOKEN.findall(caption)]


def ngrams(words: list[str], k: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(k))))


def bleu(references: dict, candidates: dict) -> list[float]:
    """Return [BLEU-1, ..., BLEU-4] of a corpus, each from 0 to 1 (Papineni et al., ACL 2002):

        BP (p_1 ... p_k)^(1/k),  BP = min(1, exp(1 - r / c))

    p_k: the share of the candidates' k-grams that occur in a reference; a k-gram counts at most as
    often as it occurs in one reference.  c: the number of the candidates' words.  r: the number of
    words of the references that are closest in length, the shorter one in a tie.  references: id ->
    lists of words; candidates: id -> words."""
    matched, total = Counter(), Counter()
    r = c = 0
    for name, words in candidates.items():
        lengths = map(len, references[name])
        _, closest = min((abs(length - len(words)), length) for length in lengths)
        r += closest
        c += len(words)
        for k in ORDERS:
            most = Counter()
            for reference in references[name]:
                most |= ngrams(reference, k)
            grams = ngrams(words, k)
            matched[k] += (grams & most).total()
            total[k] += grams.total()
    # pycocoevalcap avoids 0 / 0 in this way; it shows in the scores of single images
    ratio = (c + 1e-15) / (r + 1e-9)
    penalty = math.exp(min(0.0, 1 - 1 / ratio))
    p = [(matched[k] + 1e-15) / (total[k] + 1e-9) for k in ORDERS]
    return [penalty * math.prod(p[:k]) ** (1 / k) for k in ORDERS]


def longest_common(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            length = before[j] + 1 if word == other else max(before[j + 1], row[j])
            row.append(length)
    return row[-1]


def rouge_l(references: dict, candidates: dict) -> dict:
    """Return id -> ROUGE-L, from 0 to 1 (Lin, 2004); a corpus is scored by their mean:

        (1 + beta^2) P R / (R + beta^2 P)
        P = max LCS / len(candidate),  R = max LCS / len(reference)

    The best P and the best R may come from different references.  A caption without words counts
    as one empty word, as in pycocoevalcap."""
    scores = {}
    for name, words in candidates.items():
        words = words or [""]
        P = R = 0.0
        for reference in references[name]:
            reference = reference or [""]
            length = longest_common(words, reference)
            P = max(P, length / len(words))
            R = max(R, length / len(reference))
        scores[name] = (1 + BETA ** 2) * P * R / (R + BETA ** 2 * P) if P else 0.0
    return scores


def cider_d(references: dict, candidates: dict) -> dict:
    """Return id -> CIDEr-D, from 0 to 10 (arXiv 1411.5726, section 6); a corpus is scored by the
    mean:

        10 / 4 sum_k mean_ref  exp(-(l_c - l_ref)^2 / 2 sigma^2)
                               min(g_c, g_ref) . g_ref / |g_c| |g_ref|

    g: for each k-gram, k from 1 to 4, its count in the text times its idf, log(images / images with
    it in a reference).  l: the number of bigrams, as in pycocoevalcap.  For a single image the
    result is 0, since every idf is 0."""
    image_counts = Counter()
    for name in candidates:
        grams = set()
        for reference in references[name]:
            for k in ORDERS:
                grams |= ngrams(reference, k).keys()
        image_counts.update(grams)
    log_images = math.log(len(candidates))

    def weigh(words: list[str], k: int) -> tuple[dict, float]:
        g = {}
        for gram, count in ngrams(words, k).items():
            g[gram] = count * (log_images - math.log(max(1, image_counts[gram])))
        return g, math.sqrt(sum(x * x for x in g.values()))

    scores = {}
    for name, words in candidates.items():
        vectors = [weigh(words, k) for k in ORDERS]
        total = 0.0
        for reference in references[name]:
            gap = max(len(words), 1) - max(len(reference), 1)
            nearness = math.exp(-gap ** 2 / (2 * SIGMA ** 2))
            for k, (a, a_norm) in zip(ORDERS, vectors):
                b, b_norm = weigh(reference, k)
                if a_norm and b_norm:
                    dot = sum(min(x, b[gram]) * b[gram] for gram, x in a.items() if gram in b)
                    total += nearness * dot / (a_norm * b_norm)
        scores[name] = 10 * total / len(ORDERS) / len(references[name])
    return scores


def read_captions(path: Path) -> tuple[References, Texts, list[str]]:
    """Read COCO's captions, an object {"images": [...], "annotations": [...]} of records

        {"id": 42, "file_name": ...},  {"image_id": 42, "id": 7, "caption": ...}

    Return the captions of each image by its id, sorted by caption id; the file name of each image
    by its id; and a line for each record that is left out: an image without a caption, a record
    with the id of an earlier one, and a caption of an unlisted image.  Raises UserError for any
    other file, and for one without captions."""
    content = read_json(path)
    is_coco = isinstance(content, dict) and all(
        isinstance(content.get(part), list) for part in ("images", "annotations"))
    require((is_coco, f"{path}: expected COCO's captions, with images and annotations, found "
             f"{ascii(content)[:60]}"))
    names, captions, left_out = {}, {}, []
    for n, record in enumerate(content["images"]):
        where = f"{path}: images[{n}]"
        image_id = identity(record, where, "id")
        if image_id in names:
            left_out.append(f"{where}: image {image_id!r} is listed twice")
        else:
            names[image_id] = text(record.get("file_name"), where, "file_name")
    for n, record in enumerate(content["annotations"]):
        where = f"{path}: annotations[{n}]"
        image_id = identity(record, where, "image_id")
        caption_id = identity(record, where, "id")
        caption = text(record.get("caption"), where, "caption")
        if caption_id in captions:
            left_out.append(f"{where}: caption {caption_id!r} is there twice")
        elif image_id not in names:
            left_out.append(f"{where}: of image {image_id!r}, which is not listed")
        else:
            captions[caption_id] = image_id, caption
    references = defaultdict(list)
    numbers_first = sorted(captions, key=lambda name: (isinstance(name, str), name))
    for image_id, caption in map(captions.get, numbers_first):
        references[image_id].append(caption)
    for image_id, name in names.items():
        if image_id not in references:
            left_out.append(f"{path}: image {image_id!r}, {name}, has no caption")
    require((references, f"{path}: has no caption of an image; {''.join(left_out[:1])}"))
    return dict(references), names, left_out


def read_results(path: Path) -> tuple[Texts, list[str]]:
    """Read captions in COCO's results format: a list of {"image_id": 42, "caption": ...}, or one
    object per line.

    Return the caption of each image by its id, and a line for each further caption of an image,
    which is left out.  Raises UserError for any other file."""
    if read_text(path).lstrip().startswith("["):
        rows = [(f"{path}: [{n}]", record) for n, record in enumerate(read_json(path))]
    else:
        rows = read_json_lines(path)
    written, left_out = {}, []
    for where, record in rows:
        image_id = identity(record, where, "image_id")
        caption = text(record.get("caption"), where, "caption")
        if image_id in written:
            left_out.append(f"{where}: image {image_id!r} has a caption already")
        else:
            written[image_id] = caption
    require((written,
             f"{path}: expected captions, objects with image_id and caption, found none"))
    return written, left_out


def score(references: References, written: Texts) -> tuple[dict[str, float], list[str]]:
    """Return a corpus's scores by name, and a line for each image that is left out.

    references: one or more per image.  written: a blank text scores 0.  An image that lacks a
    reference or a written caption is left out, also from CIDEr-D's idf.  Raises UserError if no
    image is left."""
    true, candidates, left_out = {}, {}, []
    for name, captions in references.items():
        if name in written:
            true[name] = list(map(tokens, captions))
            candidates[name] = tokens(written[name])
        else:
            left_out.append(f"image {name!r}: no caption was written")
    for name in written:
        if name not in references:
            left_out.append(f"image {name!r}: no reference to compare with")
    require((true,
             f"none of {len(written)} written captions is of one of {len(references)} images "
             f"with references: ids are {list(written)[:2]} and {list(references)[:2]}"))
    means = [statistics.fmean(rule(true, candidates).values()) for rule in (rouge_l, cider_d)]
    return dict(zip(NAMES, [*bleu(true, candidates), *means])), left_out
