"""What identifiers look like: in each pattern the group `x` is what is masked, the rest is what gives it away.

Dates are full dates and months: a year alone is none, as in the Safe Harbor rule of HIPAA (45 CFR 164.514), which also
sets the age. Every repetition is bounded, so that no text takes more than linear time.

A name stands after its title. By how the title is written:

- `Dr`, `Mr`, `Mrs`, `Ms`, `Miss`, `Prof`, `Doctor`, `Professor`, with a dot or without: a capitalised name, Latin or
  Cyrillic; also after the degrees that a German doctor has (`Dr. h.c.`, `Dr.-Ing.`), and all names after `Drs`.
- `dr.`, `mr.`, `mrs.`, `ms.`, `prof.` with the dot: a name, capitalised or not. Without it (`dr Smith`): after `dr`,
  `mrs`, `prof`, `doctor`, `professor`, a capitalised one.
- `DR.`, `MRS.`, `PROF.` with the dot: a name in capitals. `DR. Smith` is left: diabetic retinopathy ends sentences.
- Never `MR` and `MS` (magnetic resonance, multiple sclerosis), `dr smith`, `DR SMITH` (digital radiography), `miss`.

Where capitals do not tell names, a name is two words at most, beside initials and particles, and none of `_ORDINARY`
("dr. said", "DR. NO EDEMA"), so Dr. Will and Dr. May are found in their usual writing alone; nor has it an article or
a possessive before it ("the dr. wants"), nor `mr.` and `ms.` a number, "on" or "in" ("30 ms. noise"), nor `DR.` a grade
("SEVERE DR. DRUSEN").
"""

from __future__ import annotations

import re

_YEAR = r"(?:1[89]|20)\d\d"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_MONTH = r"(?:0?[1-9]|1[0-2])"
_MONTH_DAY = r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_NAMED_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?|JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)\.?"
)
_NAMED_DAY = rf"{_DAY}(?:st|nd|rd|th)?"
_BIRTH = (
    r"(?P<x>\d{6}(?:\d\d)?|\d{1,4}[-/.]\s?\d{1,4}(?:[-/.]\s?\d{2,4})?|\d{1,2}\s\d{1,2}\s\d{4}"
    r"|\d{1,2}(?:st|nd|rd|th)?[-.\s]{0,2}[^\W\d_]{3,9}[-.,\s]{1,2}\d{2,4}"
    r"|[^\W\d_]{3,9}[-.,\s]{1,2}\d{1,2}(?:st|nd|rd|th)?[-.,\s]{1,2}\d{2,4})(?!\d)"
)
"""In any form and language; all but a year alone, as everywhere."""
_UNIT = r"\s?(?:%|(?:mm|cm|ml|mg|kg|HU)\b)"
_ZH_DIGITS = "[〇零一二三四五六七八九十]"

_LABELLED = r"\s{0,3}(?:is\s|was\s)?[:：#=.为是]?\s{0,3}"
_CODE = r"(?P<x>(?=[A-Z0-9/-]{0,24}\d)[A-Z0-9][A-Z0-9/-]{1,28}[A-Z0-9])"
"""At least three characters, one a digit: "case no. 5" is a figure's number."""

_HAN = "\u4e00-\u9fff"
_SURNAME = (
    "[王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟"
    "汪田姜范石姚谭廖邹熊陆郝孔崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易武乔贺赖龚]"
)
_GIVEN = f"(?!某)[{_HAN}]"
"""王某 is masked already."""
_ACCENTS = "\u0300-\u036f"
"""Apart from their letters, as text from PDFs and macOS has them."""
_LETTER = "A-Za-zÀ-ÖØ-öø-ɏ\u0400-\u045f" + _ACCENTS
"""Latin letters with all their accents, and Cyrillic ones: Łukasz, Šimić and Иванов are names too."""
_NAME = rf"(?!(?:Drs?|Mr|Mrs|Ms|Prof|Doctor)\b)[A-ZÀ-ÖØ-ÞĀ-Ɏ\u0400-\u042f](?:[{_LETTER}'’-]{{1,30}}|\.)"
"""None is a title: after "Prof. Dr." the second one's name follows."""
_PARTICLES = r"(?:(?:van|von|de|der|den|la|le|di|bin|al)\s){0,2}"
_FULL_NAME = rf"{_PARTICLES}{_NAME}(?:(?:[ ]|(?<=\.)){_PARTICLES}{_NAME}){{0,3}}"
"""Initials may stand without blanks: J.R. Smith."""
_PERSON = rf"(?P<x>{_FULL_NAME})"
_PERSONS = rf"(?P<x>{_FULL_NAME}(?:(?:,[ ]{_FULL_NAME}){{0,3}},?[ ](?:and|&)[ ]{_FULL_NAME})?)"
_DEGREES = r"(?:[.\s-]{1,3}(?:med|dent|vet|phil|habil|mult|Ing|h\.\s?c|rer\.\s?nat)\b){0,3}"
_SEX = r"(?:Male|Female|MALE|FEMALE|M|F)\b"
_LISTED = (
    rf"(?P<x>{_FULL_NAME}(?:,[ ]?(?!{_SEX}){_NAME}(?:[ ](?!{_SEX}){_NAME}){{0,2}}(?![{_LETTER}'’-]|\s{{0,3}}[:=]))?)"
)
"""As lists have it, surname first; "Smith, Age: 61" is followed by another label."""

_ORDINARY = (
    "dr|mr|mrs|ms|prof"
    "|a|about|advised|advises|after|again|agreed|agrees|also|am|an|and|appointment|appointments|are|as|asked|asks|at|be"
    "|because|been|before|but|by|called|calls|can|cannot|chest|comparison|conclusion|could|demonstrated|demonstrates"
    "|did|do|does|during|examined|examines|explained|explains|felt|feels|findings|for|from|gave|gives|had|has|have|he"
    "|her|here|his|history|how|i|if|image|images|imaging|impression|in|indication|into|is|it|its|left|lesion|lesions"
    "|may|might|must|my|no|nor|normal|not|noted|notes|of|office|on|or|ordered|orders|our|patient|performed|performs"
    "|plaque|plaques|please|prescribed|prescribes|read|reads|recommended|recommends|referred|refers|reported|reports"
    "|requested|requests|revealed|reveals|reviewed|reviews|right|said|saw|say|says|scan|scans|seen|sees|shall|she"
    "|should|show|showed|shows|signed|since|so|suggested|suggests|technique|tells|than|that|the|their|then|there|these"
    "|they|thinks|this|those|thought|to|today|told|tomorrow|visit|visits|was|we|were|what|when|where|which|while|who"
    "|why|will|with|without|would|writes|wrote|yes|yesterday|you|your"
    # what is said of diabetic retinopathy
    r"|(?:hard|soft)\sexudates?|exudates?|cotton\swool|drusen|macular?|retinal?|fundus|(?:micro)?aneurysms?"
    r"|ha?emorrhages?|neovascularization|vitreous|optic"
)
"""Words that follow a title which is no title, or a name."""
_NO_WORD = rf"(?!(?i:{_ORDINARY})(?![{_LETTER}]))"
_SMALL_LETTER, _CAPITAL = "a-zß-öø-ÿ" + _ACCENTS, "A-ZÀ-ÖØ-Þ" + _ACCENTS


def _in_one_case(first: str, rest: str) -> str:
    """A name in text whose capitals tell nothing, of such letters."""
    word = rf"(?i:{_PARTICLES}){_NO_WORD}[{first}][{rest}'’-]{{1,30}}(?![{_LETTER}])"
    return rf"(?P<x>(?:[{first}]\.\s?){{0,2}}{word}(?:\s(?:[{first}]\.\s)?{word})?)"


_NONE_BEFORE = "(?<![A-Za-z])" + "".join(
    rf"(?<!(?i:\b{word}\s))"
    for word in (
        *("the", "a", "an", "this", "that", "another", "every", "each", "any", "no"),
        *("your", "his", "her", "my", "our", "their", "its"),
        *("mild", "moderate", "severe", "proliferative", "nonproliferative", "background"),
    )
)
"""An article or a possessive before a title makes it a noun, a grade a disease."""
_SMALL_TITLE = r"(?:dr|mrs|prof|(?<!\bon\s)(?<!\bin\s)(?<!\d)(?<!\d\s)(?:mr|ms))\."

_OVER_89 = r"(?P<x>9\d|1[0-4]\d)"

_SOURCES: dict[str, tuple[str, ...]] = {
    "email": (r"(?<![\w.%+-])(?P<x>[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24})(?![\w-])",),
    "record": (
        r"(?i:(?<![A-Z0-9])(?:MRN|SSN|NHS(?:\s(?:number|no\.?))?|medical\srecord(?:\s(?:number|no\.?|id))?"
        r"|social\ssecurity(?:\snumber)?|accession|(?:record|patient|hospital|accession|case|study|exam|admission"
        rf"|account|insurance|passport)(?:'s)?\s(?:number|no\.?|id|\#)){_LABELLED}{_CODE})",
        r"(?i:(?:病历号|病案号|住院号|门诊号|就诊号|登记号|检查号|影像号|放射号|X线号|CT号|MR号|超声号|病理号|病人编号"
        rf"|患者编号|身份证号码|身份证号|身份证|医保卡号|医保号|就诊卡号){_LABELLED}{_CODE})",
        r"(?<![\dA-Za-z-])(?P<x>\d{3}-\d{2}-\d{4})(?![\d-])",  # social security number
        rf"(?<!\d)(?P<x>[1-9]\d{{5}}(?:19|20)\d\d{_MONTH_DAY}\d{{3}}[\dXx])(?!\d)",  # Chinese identity number
    ),
    "phone": (
        r"(?i:(?:\b(?:tele)?phone|\btel|\bmobile|\bcell|\bfax|\bpager|电话号码|电话|手机号码|手机号|手机|联系方式|传真)"
        rf"(?:\s(?:number|no\.?))?{_LABELLED}(?P<x>[+(]?\d[\d ()-]{{4,18}}\d)(?!\d))",
        r"(?<![\d.+-])(?P<x>(?:\+?1[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4})(?![\d.-]?\d)",  # North America
        r"(?<![\w+])(?P<x>\+\d{1,3}(?:[ -]?\(?\d{2,4}\)?){3,5})(?!\.?\d)",  # international
        r"(?<!\d)(?P<x>1[3-9]\d[ -]?\d{4}[ -]?\d{4})(?!\d)",  # Chinese mobile
        r"(?<![\d-])(?P<x>0\d{2,3}-\d{7,8})(?!\d)",  # Chinese land line
    ),
    "date": (
        rf"(?<!\d)(?<!\d[./-])(?P<x>{_YEAR}(?P<sep>[-/.]){_MONTH}(?P=sep){_DAY})(?!\d)",
        rf"(?<!\d)(?<!\d[./-])(?P<x>{_DAY}(?P<sep>[-/.]){_DAY}(?P=sep){_YEAR})(?!\d)",
        rf"(?<!\d)(?<!\d[./-])(?P<x>{_DAY}(?P<sep>[-/]){_DAY}(?P=sep)\d\d)(?![\d/-]|\.\d|{_UNIT})",
        rf"(?<![\w.-])(?P<x>{_YEAR}{_MONTH_DAY})(?![\w.-]?\d)",  # as DICOM writes it
        rf"(?<![A-Za-z])(?P<x>{_NAMED_MONTH}\s{_NAMED_DAY},?\s{_YEAR})(?!\d)",
        rf"(?<![\d.])(?P<x>{_NAMED_DAY}(?:\sof)?[\s-]{_NAMED_MONTH}(?:,?[\s-]{_YEAR})?)(?![A-Za-z\d])",
        rf"(?<![A-Za-z])(?P<x>{_NAMED_MONTH},?\s{_YEAR})(?!\d)",
        rf"(?<![A-Za-z])(?P<x>{_NAMED_MONTH}\s{_NAMED_DAY})(?![\d.]{{0,9}}\d)(?!{_UNIT})",
        rf"(?i:\b(?:D\.?O\.?B\.?|date\sof\sbirth|birth\s?date|geb\.){_LABELLED}{_BIRTH})",
        r"(?<!\d)(?P<x>\d{2,4}\s?年\s?\d{1,2}\s?月(?:\s?\d{1,2}\s?[日号])?)",
        r"(?<![\d年])(?P<x>\d{1,2}\s?月\s?\d{1,2}\s?[日号])",
        f"(?P<x>{_ZH_DIGITS}{{2,4}}年{_ZH_DIGITS}{{1,3}}月(?:{_ZH_DIGITS}{{1,3}}[日号])?)",
    ),
    "name": (
        rf"(?<![{_LETTER}])(?:(?:Dr|Dipl){_DEGREES}|Mr|Mrs|Ms|Miss|Prof|Professor|Doctor|[Дд]-р|[Дд]октор)"
        rf"(?:\.\s{{0,3}}|\s{{1,3}}){_PERSON}",
        rf"(?<![A-Za-z])Drs(?:\.\s{{0,3}}|\s{{1,3}}){_PERSONS}",
        rf"(?=[dmp]){_NONE_BEFORE}(?:{_SMALL_TITLE}\s{{0,3}}|(?:dr|mrs|prof|doctor|professor)\s{{1,3}})"
        rf"(?:(?=[A-Z]\.\s?[A-Z])|{_NO_WORD}){_PERSON}",
        rf"(?=[dmp]){_NONE_BEFORE}{_SMALL_TITLE}\s{{1,3}}{_in_one_case(_SMALL_LETTER, _SMALL_LETTER)}",
        rf"(?=[DMP]){_NONE_BEFORE}(?:DR|MRS|PROF)\.\s{{0,3}}{_in_one_case(_CAPITAL, _CAPITAL)}",
        r"(?<![A-Za-z])(?:[Pp]atient(?:'s)?\s[Nn]ame|PATIENT\sNAME|[Nn]ame\sof\s(?:the\s)?patient|Name|NAME)"
        r"\s{0,3}[:=]\s{0,3}" + _LISTED,
        # that a person follows a bare "Patient:" takes two capitalised words: dialogues have it before each turn
        rf"(?<![A-Za-z])(?:Patient|PATIENT|Pat\.)\s{{0,3}}[:=]\s{{0,3}}(?={_NAME},?[ ]{_NAME}){_LISTED}",
        r"(?<![A-Za-z])(?:Radiologist|RADIOLOGIST"
        r"|(?i:ref(?:erring|\.)\s(?:physician|doctor)|(?:reported|signed|dictated)\sby))"
        r"\s{0,3}[:=]\s{0,3}" + _PERSON,
        r"(?<![A-Za-z^])(?P<x>[A-Z][A-Za-z'-]{1,30}\^[A-Z][A-Za-z'-]{0,30}(?:\^[A-Za-z'-]{0,30}){0,3})",  # as in DICOM
        r"(?:姓名|报告医生|审核医生|报告医师|审核医师|检查医师|检查医生|主治医师|主管医生)\s{0,3}[:：]\s{0,3}"
        rf"(?P<x>[{_HAN}·]{{2,4}}?(?=性别|年龄|男|女|[^{_HAN}·]|$)|{_SURNAME}{_GIVEN}{{1,2}})",
        rf"(?:(?<![{_HAN}])|(?<=[由经请与和及跟]))(?P<x>{_SURNAME}(?:{_GIVEN}){{0,2}}?)"
        "(?:主任|医生|医师|大夫|教授|护士|先生|女士|小姐)",
        rf"(?:患者|病人)[:：]?\s?(?P<x>{_SURNAME}(?:{_GIVEN}){{1,2}})(?=[，,、\s]{{0,2}}[男女])",
    ),
    "age": (
        rf"(?i:(?<![\d.]){_OVER_89}(?=[\s-]{{0,2}}(?:(?:years?|yrs?)[\s-]{{1,2}}old|y/o|y\.o|yo\b)))",
        r"(?i:\bage(?:d|\sof|\sis)?\s{0,3}[:=]?\s{0,3}" + _OVER_89 + r"(?!\.?\d|\s?(?:%|mm|cm|months?|days?|weeks?)))",
        r"(?i:\b(?P<x>nonagenarian|centenarian)s?\b)",
        rf"(?<![\d.]){_OVER_89}(?=\s?(?:周|多)?岁)",
        rf"年龄\s{{0,3}}[:：为是]?\s{{0,3}}{_OVER_89}(?!\.?\d)",
        f"(?P<x>九十[一二三四五六七八九]?|一?百{_ZH_DIGITS}{{0,3}})(?=多?岁)",
    ),
}

KINDS = tuple(_SOURCES)
"""In the order in which they win where two equally long ones begin together."""
PATTERNS = tuple((kind, re.compile(source)) for kind, sources in _SOURCES.items() for source in sources)
