"""Captions against what people wrote of the same pictures: BLEU, ROUGE-L and CIDEr-D as COCO counts them.

    references, names, bad = captions.read_captions(Path("captions_val2014.json"))
    written, more = captions.read_results(Path("results.json"))
    scores, each, left_out = captions.score(references, written)

The figures are those of the package pycocoevalcap (COCO caption evaluation, arXiv 1504.00325), not in
percent: BLEU and ROUGE-L from 0 to 1, CIDEr-D from 0 to 10 and around 1 for a good captioner.  The package's
METEOR and SPICE, programs in Java with data of their own, are not here.

Ids are a picture's, an int or a str.  Words are what `tokens` makes of a text, in lower case.
"""

import html
import math
import re
import statistics
import unicodedata
from collections import Counter
from pathlib import Path

from cli import require
from files import read_json, read_json_lines, read_text
from sources import identity, text

NAMES = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
ASCII = str.maketrans({
    **dict.fromkeys("‘’‛‹›", "'"), **dict.fromkeys("“”«»", '"'), **dict.fromkeys("–—―", "--"), "…": "...",
    "£": "#", "€": "$", "¢": " cents ", "¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "\xad": ""})
BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-",
                          "}": "-rcb-"})
# words that keep their full stop: in any case, with a capital only, before a number only
SHORT = """adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros
    calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec esq est
    etc ext feb fla fri ft ga gen gov govs hon inc ind intl jan jos jr jul jun kan kans ky lieut lt ltd
    maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms mt natl neb nev nov oct okla penn pfc ph
    plc pres prof pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts tel
    tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo""".split()
STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
COUNTED = "art ca figs? nos? op pp prop".split()
STARTS = "The|An?|In|At|It|He|She|They|We|This|There"       # of a sentence: the letter before ends another
L, W = r"[^\W\d_]", r"[^\W_]"                               # a letter; a letter or digit
CLITIC = rf"(?:n't|'(?:s|m|d|re|ve|ll))(?!{L})"
TOKEN = re.compile(rf"""(?i:
      (?:https?://|www\.)\S+?(?=[.,!?;:'")]*(?:\s|$))       # what is in the web
    | \w[\w.+-]*@\w[\w-]*(?:\.\w+)*  |  [@#]{L}\w*  |  </?{L}[^\s<>]*>  |  [:;=]-?(?:[()]|[dp](?!{W}))
    | {CLITIC}  |  {L}+?(?=n't(?!{L}))                      # it 's, ca n't
    | can(?=not\b) | got(?=ta\b) | (?:gon|wan)(?=na\b) | (?:lem|gim)(?=me\b) | 't(?=(?:is|was)\b)
    | (?<!{W})'\d\ds?(?![\w'])  |  'n'  |  '(?:em|til|cause|n)(?!{W})        # 'em, the '80s, rock 'n' roll
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
    | [^\w\s.,:;'"`!?\-\x00-\x1f\x7f-\x9f\u200b-\u200f\ufe0f\ufeff\U00010000-\U0010ffff]""", re.VERBOSE)


def tokens(caption: str) -> list[str]:
    """English text -> lower-case words, as COCO's evaluation makes them with Stanford's PTBTokenizer 3.4.1
    (-preserveLines -lowerCase) and a list of punctuation to leave out; here without Java.

    "Don't!" is do n't, "gonna" gon na, "the dogs' U.S. T-shirt" the dogs u.s. t-shirt.  Quotes, full stops,
    commas, colons and dashes are left out, a single ! or ? too, but "!!" is a word, and brackets are -lrb-
    and -rrb-: the list there has them in capitals, which never come.  Unlike Stanford's, of which
    tests/compare_captions.py counts how often: names with an apostrophe come apart (Hawai'i, Po'Boy), as do
    c++, \\o/, "2.x" and "<a tag>", and (555) is three words; a third slash joins too; accents are composed,
    and scripts with marks on letters are not cared for.  A letter with a full stop that ends a caption loses
    it; there it does when the next caption begins with a word like "A"."""
    caption = re.sub("&(amp|lt|gt|quot|apos|nbsp);", lambda found: html.unescape(found[0]), caption)
    caption = unicodedata.normalize("NFC", caption).translate(ASCII)
    return [found.translate(BRACKETS).lower() for found in TOKEN.findall(caption)]


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(references: dict, candidates: dict, n: int = 4) -> list[float]:
    """[BLEU-1, ..., BLEU-n] of a corpus, each from 0 to 1 (Papineni et al., ACL 2002):

        BP (p_1 ... p_k)^(1/k),  BP = min(1, exp(1 - r / c))

    p_k: the share of the candidates' k-grams that a reference has, each as often as in one reference at most.
    c: the candidates' words; r: those of the references closest in length, of equally close ones the shorter.
    references: id -> lists of words; candidates: id -> words.  A picture's own BLEU is that of it alone."""
    right, made, r, c = [0] * n, [0] * n, 0, 0
    for name, words in candidates.items():
        c += len(words)
        r += min((abs(len(one) - len(words)), len(one)) for one in references[name])[1]
        for k in range(n):
            most = Counter()
            for one in references[name]:
                most |= ngrams(one, k + 1)
            mine = ngrams(words, k + 1)
            right[k] += (mine & most).total()
            made[k] += mine.total()
    # pycocoevalcap's way around 0 / 0, seen in figures of single pictures
    ratio = (c + 1e-15) / (r + 1e-9)
    penalty = math.exp(min(0.0, 1 - 1 / ratio))
    p = [(right[k] + 1e-15) / (made[k] + 1e-9) for k in range(n)]
    return [penalty * math.prod(p[:k]) ** (1 / k) for k in range(1, n + 1)]


def common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def rouge_l(references: dict, candidates: dict, beta: float = 1.2) -> dict:
    """id -> ROUGE-L, from 0 to 1 (Lin, 2004), whose mean is the corpus's:

        (1 + beta^2) P R / (R + beta^2 P),  P = max LCS / len(candidate),  R = max LCS / len(reference)

    The best P and the best R may be of two references.  A caption without words is one empty word, as in
    pycocoevalcap."""
    values = {}
    for name, words in candidates.items():
        words = words or [""]
        pairs = [(common(words, one or [""]), len(one or [""])) for one in references[name]]
        P, R = max(lcs for lcs, _ in pairs) / len(words), max(lcs / length for lcs, length in pairs)
        values[name] = (1 + beta ** 2) * P * R / (R + beta ** 2 * P) if P else 0.0
    return values


def cider_d(references: dict, candidates: dict, n: int = 4, sigma: float = 6.0) -> dict:
    """id -> CIDEr-D, from 0 to 10 (arXiv 1411.5726, section 6), whose mean is the corpus's:

        10 / n sum_k mean_ref  exp(-(l_c - l_ref)^2 / 2 sigma^2)  min(g_c, g_ref) . g_ref / |g_c| |g_ref|

    g: how often each k-gram is in the text times its idf, log(pictures / pictures with it in a reference).
    l is the number of bigrams, as in pycocoevalcap.  Of a single picture all is 0, since every idf is."""
    seen, count = Counter(), math.log(len(candidates))
    for name in candidates:
        seen.update({gram for one in references[name] for k in range(n) for gram in ngrams(one, k + 1)})

    def weighed(words: list[str]) -> list[tuple[dict, float]]:
        vectors = [{gram: times * (count - math.log(max(1, seen[gram])))
                    for gram, times in ngrams(words, k + 1).items()} for k in range(n)]
        return [(g, math.sqrt(sum(x * x for x in g.values()))) for g in vectors]

    values = {}
    for name, words in candidates.items():
        mine, total = weighed(words), 0.0
        for one in references[name]:
            apart = max(len(words), 1) - max(len(one), 1)
            near = math.exp(-apart ** 2 / (2 * sigma ** 2))
            for (a, a_norm), (b, b_norm) in zip(mine, weighed(one)):
                dot = sum(min(x, b[gram]) * b[gram] for gram, x in a.items() if gram in b)
                total += near * dot / (a_norm * b_norm) if a_norm and b_norm else 0.0
        values[name] = 10 * total / n / len(references[name])
    return values


def read_captions(path: Path) -> tuple[dict[int | str, list[str]], dict[int | str, str], list[str]]:
    """Read COCO's captions, an object {"images": [...], "annotations": [...]} of records

        {"id": 42, "file_name": ...},  {"image_id": 42, "id": 7, "caption": ...}

    Return the captions of each image by its id, in the order of their own ids; the file name of every image
    by its id; and a line for each record that is left out: an image without a caption, the second of two
    records with the same id, and a caption of an image that is not listed.  Raises UserError for any other
    file, and for one without a caption."""
    content = read_json(path)
    is_coco = isinstance(content, dict) and all(
        isinstance(content.get(part), list) for part in ("images", "annotations"))
    require((is_coco, f"{path}: expected COCO's captions, with images and annotations, found "
             f"{ascii(content)[:60]}"))
    names, captions, bad = {}, {}, []
    for n, record in enumerate(content["images"]):
        where = f"{path}: images[{n}]"
        image_id = identity(record, where, "id")
        if image_id in names:
            bad.append(f"{where}: picture {image_id!r} is listed twice")
            continue
        names[image_id] = text(record.get("file_name"), where, "file_name")
        captions[image_id] = []
    caption_ids = set()
    for n, record in enumerate(content["annotations"]):
        where = f"{path}: annotations[{n}]"
        image_id = identity(record, where, "image_id")
        caption_id = identity(record, where, "id")
        caption = text(record.get("caption"), where, "caption")
        if caption_id in caption_ids:
            bad.append(f"{where}: caption {caption_id!r} is there twice")
        elif image_id not in names:
            bad.append(f"{where}: of picture {image_id!r}, which is not listed")
        else:
            captions[image_id].append((isinstance(caption_id, str), caption_id, caption))
            caption_ids.add(caption_id)
    references = {image_id: [caption for *_, caption in sorted(entries)]
                  for image_id, entries in captions.items() if entries}
    bad += [f"{path}: picture {image_id!r}, {name}, has no caption"
            for image_id, name in names.items() if image_id not in references]
    require((bool(references), f"{path}: has no caption of a picture; {'; '.join(bad[:1])}"))
    return references, names, bad


def read_results(path: Path) -> tuple[dict[int | str, str], list[str]]:
    """Read COCO's results, a list of {"image_id": 42, "caption": ...} or one such object a line.

    Return the caption of each image by its id, and a line for each second caption of an image, which is left
    out.  Raises UserError for any other file."""
    if read_text(path).lstrip().startswith("["):
        rows = [(f"{path}: [{n}]", record) for n, record in enumerate(read_json(path))]
    else:
        rows = list(read_json_lines(path))
    require((bool(rows), f"{path}: expected captions, objects with image_id and caption, found none"))
    written, bad = {}, []
    for where, record in rows:
        image_id = identity(record, where, "image_id")
        caption = text(record.get("caption"), where, "caption")
        if image_id in written:
            bad.append(f"{where}: picture {image_id!r} has a caption already")
        else:
            written[image_id] = caption
    return written, bad


def score(references: dict[int | str, list[str]], written: dict[int | str, str]
          ) -> tuple[dict[str, float], dict[int | str, dict[str, float]], list[str]]:
    """(figures by name, those of each picture by id, a line for each picture that was left out).

    references: id -> texts; written: id -> text, a blank one too, which scores 0.  Pictures that lack one or
    the other are left out, of the document frequencies too.  Raises UserError when none is left."""
    names = [name for name in references if references[name] and name in written]
    bad = [f"picture {name!r}: no caption was written" for name in references if name not in written]
    bad += [f"picture {name!r}: no reference to compare with" for name in written if not references.get(name)]
    require((bool(names), f"none of {len(written)} written captions is of one of {len(references)} pictures "
             f"with references: ids are {list(written)[:2]} and {list(references)[:2]}"))
    gold = {name: [tokens(one) for one in references[name]] for name in names}
    mine = {name: tokens(written[name]) for name in names}
    rouge, cider = rouge_l(gold, mine), cider_d(gold, mine)
    each = {name: dict(zip(NAMES, [*bleu({name: gold[name]}, {name: mine[name]}), rouge[name], cider[name]]))
            for name in names}
    means = [statistics.fmean(values.values()) for values in (rouge, cider)]
    return dict(zip(NAMES, [*bleu(gold, mine), *means])), each, bad
