"""The words that `core.recipe` understands, English and Chinese, as one table.

A row is `operation | English terms | Chinese terms`; rows stand in the order in which operations are applied, under the
heading of their stage. A term with a tilde is weak: it counts only when no other operation of its stage was named (the
garden in "spring garden" is a garden, in "zen garden" it is not spring). A degree with `>` follows its operation.
"""

# ruff: noqa: E501 (a table row is a line)

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_OPERATIONS = """
= geometry
mirror | mirror, mirrored, mirror image, flip horizontally, horizontal flip | 镜像, 左右翻转, 水平翻转
flip | flip, flip vertically, vertical flip | 翻转, 上下翻转, 垂直翻转
rotate | upside down, rotate 180, rotate by 180, rotate it 180, rotate it by 180, rotate picture 180, rotate picture by 180, rotate image 180, rotate image by 180, rotate photo 180, rotate photo by 180 | 倒置, 旋转180, 颠倒
= mood
sunset | sunset, sunrise, dusk, dawn, golden hour, evening glow | 日落, 夕阳, 黄昏, 晚霞, 日出, 朝霞
night | night, nighttime, midnight, moonlight, moonlit, ~star, ~starry, ~evening | 夜晚, 夜景, 夜间, 黑夜, 深夜, 月光, 夜色, 晚上, ~夜
winter | winter, snow, snowy, snowfall, snow fall, falling snow, ice, icy, frozen, frost, frosty, christmas | 冬天, 冬季, 冬日, 雪景, 下雪, 冰雪, 雪, 冰, 圣诞
spring | spring, springtime, cherry blossom, ~garden, ~flower, ~floral, ~blossom, ~meadow | 春天, 春季, 春日, 樱花, ~花园, ~花朵, ~鲜花
autumn | autumn, autumnal, fall, falling leaves, fallen leaves, harvest | 秋天, 秋季, 秋日, 落叶, 枫叶, 金秋
underwater | underwater, under water, under sea, undersea, ocean, aquarium, coral, coral reef, deep sea, ~sea | 水下, 海底, 深海, 海洋, 珊瑚
space | space, outer space, nebula, galaxy, galactic, cosmic, cosmos, universe | 太空, 宇宙, 星云, 银河, 星空, 星系
cyberpunk | cyberpunk, cyber punk, neon, futuristic, sci fi, science fiction, vaporwave, ~future | 赛博朋克, 霓虹, 科幻, 未来感
fantasy | fantasy, magical, magic, fairy tale, fairytale, enchanted, dreamy, dreamlike, mystical, ethereal | 奇幻, 魔幻, 魔法, 梦幻, 童话, 仙境
steampunk | steampunk, steam punk, brass, clockwork, ~gear | 蒸汽朋克, 黄铜, 齿轮
medieval | medieval, middle ages, castle, knight, gothic | 中世纪, 城堡, 骑士, 哥特
wasteland | wasteland, apocalypse, apocalyptic, post apocalyptic, dystopia, dystopian, ~desert, ~ruins | 废土, 末日, 荒原, 废墟, ~沙漠
tropical | tropical, tropics, palm tree, summer, summery, sunny, ~beach, ~palm, ~island | 热带, 棕榈, 夏天, 夏季, 夏日, 阳光, ~海滩, ~沙滩
zen | zen, japanese, japan, tranquil, serene, wabi sabi | 禅意, 禅, 日式, 日本, 和风, 枯山水, 宁静
retro80s | 80s, 1980s, eighties, retro 80s, retro 1980s, synthwave, retrowave | 80年代, 八十年代, 蒸汽波
cinematic | cinematic, movie, film look, blockbuster | 电影感, 电影, 大片
forest | ~forest, ~woods, ~jungle, ~rainforest | ~森林, ~丛林, ~树林
fog | fog, foggy, mist, misty, haze, hazy | 雾, 薄雾, 雾气, 迷雾, 朦胧
rain | rain, rainy, rainfall, storm, stormy | 雨, 下雨, 雨天, 暴雨, 雨景
pastel | pastel, candy | 马卡龙, 粉彩, 糖果色
vintage | vintage, old photo, old photograph, aged, antique, nostalgic, nostalgia, faded, ~retro, ~old | 老照片, 怀旧, 做旧, 泛黄, 旧照片, 年代感, ~复古
= light
brighter | brighter, bright, brighten, brightness, lighter, lighten, exposure | 亮, 明亮, 提亮, 增亮, 调亮, 变亮, 亮度, 曝光
darker | darker, dark, darken, dim, gloomy, moody | 暗, 变暗, 调暗, 压暗, 昏暗, 阴沉
contrast | contrast, high contrast, contrasty, dramatic, hdr, punchy | 对比度, 对比, 反差, 戏剧性
flat | flat, matte, low contrast | 低对比, 平淡, 哑光
warmer | warmer, warm, warmth, cosy, cozy | 暖, 暖色, 暖色调, 温暖, 暖和
cooler | cooler, cool, cold, chilly | 冷, 冷色, 冷色调, 寒冷, 清冷
vivid | vivid, vibrant, vibrance, vibrancy, colourful, saturate, saturated, saturation, bright colour, rich colour | 鲜艳, 艳丽, 饱和, 饱和度, 绚丽, 色彩丰富, 五彩, 缤纷
muted | muted, mute, less colour, desaturate, desaturated, washed out, pale, subdued | 淡雅, 素雅, 低饱和, 褪色
= colour
tint | |
posterise | posterise, posterize, poster, pop art | 海报化, 色调分离, 波普
invert | invert, negative, inverted colour, invert colour | 反色, 反相, 负片, 反转颜色
black_and_white | black and white, black & white, black white, b&w, bw, greyscale, grey scale, monochrome, grey, colourless, without colour, no colour, remove colour, remove all colour, noir | 黑白, 灰度, 单色, 灰色, 去色
sepia | sepia, brown tone | 棕褐色, 褐色调, 乌贼墨
= style
watercolour | watercolour, water colour, aquarelle | 水彩画, 水彩
oil | oil, oil paint, oil painting, impressionist, impressionism, van gogh, monet, ~painting, ~painterly, ~painted | 油画, 印象派, 梵高, 莫奈, ~绘画
sketch | sketch, sketchy, pencil, drawing, charcoal, line art | 素描, 铅笔画, 铅笔, 速写, 线稿, 炭笔
ink | ink, ink wash, ink painting, ink wash painting, chinese painting, sumi e, sumi | 水墨, 水墨画, 国画, 中国画, 墨
comic | comic, comic book, cartoon, anime, manga, ghibli, toon, cel shaded, ~illustration | 漫画, 卡通, 动漫, 动画, 吉卜力, 二次元, ~插画
abstract | abstract, cubist, cubism, abstract art, abstract painting | 抽象, 抽象画, 立体派
pixelate | pixelate, pixel, pixel art, mosaic, 8 bit | 像素, 像素化, 像素风, 马赛克
emboss | emboss, relief, engraved | 浮雕
= finish
smooth | smooth, denoise, noise reduction, noise removal, remove noise, remove grain | 降噪, 去噪, 去噪点, 消除噪点, 去除噪点, 去掉噪点, 消除颗粒, 去除颗粒, 平滑, 磨皮
blur | blur, blurry, defocus, out of focus | 模糊
blur_background | blur background, background blur, background blurry, background blurred, background is blurred, background should be blurred, background out of focus, blurred background, blurry background, bokeh, depth of field, portrait mode | 背景虚化, 虚化背景, 虚化, 模糊背景, 背景模糊, 景深
soft | soft, soften, soft focus, soft light, glow, glowing, gentle | 柔和, 柔焦, 柔光, 柔美, 朦胧美
sharpen | sharpen, sharp, sharper, crisp, clearer, clarity, detailed, detail | 清晰, 锐化, 清楚, 锐利, 细节
sparkles | sparkle, sparkling, magical sparkle, glitter, glittering, twinkle, shimmer, ~firefly | 闪光, 星光, 闪烁, 亮片, 闪闪发光, 火花
grain | grain, grainy, film grain, noise, noisy | 颗粒, 颗粒感, 胶片颗粒, 噪点, 胶片
vignette | vignette, vignetting, dark corner, dark edge | 暗角, 晕影
"""

_COLOURS = """
red | e03131 | red, crimson, scarlet, ruby, coral red | 红色, 红
orange | f2822a | orange, amber | 橙色, 橘色, 橙
yellow | f2d43a | yellow, lemon | 黄色, 黄
gold | e6b422 | gold, golden | 金色, 金黄, 金黄色, 黄金
maroon | 7a1f2b | maroon, burgundy, dark red | 深红色, 深红, 酒红
green | 3aa655 | green, emerald | 绿色, 绿, 翠绿
olive | 5f6b2e | olive, dark green | 深绿色, 深绿, 橄榄绿, 墨绿
mint | 8fdcb9 | mint | 薄荷色, 薄荷绿
teal | 1f8a8a | teal, turquoise | 青绿色, 青绿
cyan | 3cc8dc | cyan, aqua | 青色, 青
blue | 2f62d0 | blue, azure, cobalt | 蓝色, 蓝
sky | 7cc0ee | sky blue, light blue, baby blue, ice blue | 天蓝色, 天蓝, 浅蓝色, 浅蓝
navy | 1c2f6b | navy, indigo, dark blue | 深蓝色, 深蓝, 靛蓝
purple | 7b3fb3 | purple, violet, lilac | 紫色, 紫
lavender | b9a3e3 | lavender | 薰衣草, 淡紫色, 淡紫
magenta | d0359b | magenta, fuchsia | 品红, 洋红, 玫红
pink | f28ab2 | pink, rose, coral pink | 粉色, 粉红, 粉红色, 玫瑰色
brown | 7d5233 | brown, bronze, copper | 棕色, 褐色, 咖啡色
silver | bcc4cf | silver | 银色
"""

_DEGREES = """
0.4 | slightly, subtle, subtly, faintly, faint, hint of, touch of, lightly | 轻微, 微微, 淡淡, 略微, 略
0.5 | bit, little, mildly, mild, half, kind of | 稍微, 稍稍, 稍, 有点, 有些, >一点, >一点点, >一些, >点
0.7 | somewhat, moderately, fairly | 比较, 适度, 适当
1.5 | very, much, strongly, strong, really, highly, deeply, heavily, heavy, intense, lot | 很, 非常, 十分, 强烈, 大幅, 明显
2.0 | extremely, extreme, super, ultra, insanely, as possible | 极其, 极度, 极, 超级, 超, 特别, 最
"""

_MARKS = """
not | not, no, don't, dont, do not, does not, doesn't, never, without, avoid, remove, isn't, shouldn't, except, nor, cannot | 不要, 别, 不, 没有, 无, 勿, 去掉, 去除, 移除, 避免, 而不是
cap | not too, not very, not so, not overly, no too, don't too | 不要太, 别太, 不太, 不用太, 不要过于, 不能太
too | too, overly | 太, 过于, 过
way | horizontally = mirror, left to right = mirror, vertically = flip, top to bottom = flip |
less | less, reduce, decrease, lower, low, weaken, tone down | 减少, 降低, 减弱, 弱化, 少, 低
stop | but, however, instead, then, rather, only, though | 但, 但是, 而是, 然后, 接着, 只, 只要, 并且
join | and, or, plus, &, + | 和, 或, 与, 且, 又, 、
fill | with, more, even, also, colour, tone | 更, 更加, 再, 色调, 色
verb | make, turn, add, change, convert, transform, apply, give, create, keep, use, let | 让, 把, 使, 变成, 加, 添加, 改成, 转成, 保持
by | by, increase, raise, boost | 增加, 提高, 提升, 增强, 加强
skip | not only, not just, nothing but, falling, ice cream, spring roll, olive oil, palm oil, coconut oil, no matter | 去雾, 除雾, 漂亮, 月亮, 不仅, 不但, 不只, 冷静, 雨伞, 一点也, 无论, 点缀
"""

# Words that mean no operation. They say what a colour or a degree beside them is meant for (`core.objects`). "picture"
# and "aspect": the picture and what it has as a whole; "scene": a place that fills it; "manner": adjectives of no use;
# "link": between a thing and what it is to be; "cause": verbs that make things so.
_ASIDE = """
picture | it, everything, thing, things, stuff, film, picture, image, photo, photograph, photography, pic, shot, snapshot, frame, portrait, selfie, composition, artwork, art, render, rendering, wallpaper, version, look, style, effect, filter, finish, feel, feeling, vibe, mood, atmosphere, ambience, aesthetic, edit, edition, result, exposure, design, colouring, grading, grade, theme | 图片, 图像, 照片, 相片, 画面, 画质, 整体, 全图, 图, 照, 人像, 风格, 风, 效果, 感觉, 感, 氛围, 气氛, 作品, 版本, 滤镜, 画, 它, 片子
aspect | light, lighting, shadow, highlight, hue, tint, palette, shade, scheme, background light, sunlight, daylight, lamp, contour, outline, edge, line, stroke, texture, particle, gradient, transition | 光线, 光, 灯光, 阴影, 高光, 颜色, 色彩, 调子, 线条, 边缘, 影调
scene | scene, scenery, landscape, cityscape, city, town, village, street, alley, room, interior, kitchen, bedroom, bathroom, office, cafe, restaurant, shop, studio, place, world, land, view, vista, weather, day, morning, afternoon, evening, hour, time, season, climate, horizon, environment, setting, machine, era, age, period | 场景, 风景, 景色, 景观, 城市, 街道, 世界, 房间, 天气, 早晨, 清晨, 时代, 季节
manner | beautiful, nice, lovely, pretty, good, great, better, best, amazing, stunning, gorgeous, awesome, natural, realistic, professional, modern, artistic, elegant, clean, fresh, cute, romantic, epic, high, quality, perfect, overall, general, generally, everywhere, nicely, beautifully, new, different | 清新, 唯美, 好看, 浪漫, 自然, 干净, 高级, 可爱, 温馨, 优雅, 美丽, 完美, 真实
determiner | her, his, their, my, your, our, its, this, that, these, those, some, both, each, every, all, whole, entire, any, up, down, out | 这, 那, 这张, 这个, 那个, 那张, 整张, 整个, 所有, 全部, 她, 他, 我, 你, 我的, 她的, 他的
of | of, on, at, around, over | 上, 里, 中
to | to, into, in | 为, 成
link | wear, wears, wearing, dressed, should, would, could, will, can, must, is, are, be, was, were, become, becomes, becoming, look, looks, looking, seem, seems, appear, get, gets, as, like, being | 变, 变得, 染成, 染, 换成, 换, 涂成, 画成, 调成, 调, 弄成, 做成, 得, 是, 偏, 显得
cause | paint, dye, recolour, set, render, have, want, wants, colourise, tinted, repaint, swap, replace, put, show | 将, 给, 想要, 希望
possessing | 's | 的
small | please, hi, hello, hey, ok, okay, now, thanks, thank, you, i, me, we, he, she, they, so, if, for, from, than, about, just, there, here, what, which, who, how, much, many, also, too, do, did, has, had, one, two, kind, sort, way | 请, 你好, 您好, 嗨, 好的, 帮, 帮我, 了, 着, 地, 张, 个, 只是, 一下, 吧, 啊, 呢, 吗, 一张, 一个, 一件, 一条, 一只, 一种, 一幅, 种, 幅, 些, 点
"""

OPPOSITES: Mapping[str, str] = {
    "brighter": "darker", "darker": "brighter", "contrast": "flat", "flat": "contrast", "warmer": "cooler",
    "cooler": "warmer", "vivid": "muted", "muted": "vivid", "sharpen": "soft", "soft": "sharpen", "blur": "sharpen",
    "grain": "smooth",
}  # fmt: skip

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|(?<![\w%])-\d+(?:\.\d+)?%|\d+(?:\.\d+)?%?|[㐀-鿿]|[^\w\s\-]|\n")
_ARTICLES = {"the", "a", "an"}
_SUFFIXES = ("s", "es", "ed", "d", "ing", "er", "r", "en", "ened", "ening", "ens", "ish", "ly", "y", "ness")


@dataclass(frozen=True, slots=True)
class Term:
    """What a word or phrase means. kind: op, colour, degree, or a mark: not, cap, too, less, stop, join, fill, verb, by,
    skip, way (which of two operations, `name`, is meant).

    weak: gives way to another operation of its stage. trails: a degree that follows its operation (亮一点)."""

    kind: str
    name: str = ""
    value: float = 1.0
    weak: bool = False
    trails: bool = False


def tokens(text: str) -> list[str]:
    """Lower-case words, numbers, single Chinese characters and punctuation marks; articles are left out."""
    text = text.lower().replace("’", "'").replace("−", "-").replace("color", "colour").replace("gray", "grey")
    return [token for token in _TOKEN.findall(text) if token not in _ARTICLES]


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines() if "|" in line]


def _terms(*cells: str) -> list[str]:
    return [term.strip() for cell in cells for term in cell.split(",") if term.strip()]


def _lexicon() -> dict[tuple[str, ...], Term]:
    found: dict[tuple[str, ...], Term] = {}
    for name, *cells in _rows(_OPERATIONS):
        for word in _terms(*cells):
            found[tuple(tokens(word.lstrip("~")))] = Term("op", name, weak=word.startswith("~"))
    for name, _, *cells in _rows(_COLOURS):
        found |= {tuple(tokens(word)): Term("colour", name) for word in _terms(*cells)}
    for value, *cells in _rows(_DEGREES):
        for word in _terms(*cells):
            trails = word.startswith(">")
            found[tuple(tokens(word.lstrip(">")))] = Term("degree", value=float(value), trails=trails)
    for kind, *cells in _rows(_MARKS):
        for word, _, name in (term.partition(" = ") for term in _terms(*cells)):
            found[tuple(tokens(word))] = Term(kind, name)
    return found


def _stages() -> dict[str, str]:
    stage, found = "", {}
    for line in _OPERATIONS.strip().splitlines():
        if line.startswith("="):
            stage = line[1:].strip()
        else:
            found[line.split("|")[0].strip()] = stage
    return found


STAGES: Mapping[str, str] = _stages()
"""Stage of every operation, in the order in which operations are applied."""

COLOURS: Mapping[str, str] = {row[0]: row[1] for row in _rows(_COLOURS)}
"""Colour names and their sRGB as hex."""

LEXICON: Mapping[tuple[str, ...], Term] = _lexicon()
ASIDE: Mapping[tuple[str, ...], Term] = {
    tuple(tokens(word)): Term(kind) for kind, *cells in _rows(_ASIDE) for word in _terms(*cells) if tokens(word)
}
"""Words beside those of the lexicon, which come first."""

LONGEST: dict[str, int] = {}
"""By first word, the length of the longest phrase."""
for _phrase in LEXICON:
    LONGEST[_phrase[0]] = max(len(_phrase), LONGEST.get(_phrase[0], 0))
_KNOWN = {token for phrase in LEXICON for token in phrase}


def base(token: str) -> str:
    """A word form led back to a form that the lexicon holds, if it does: brightening -> bright, colours -> colour."""
    if token in _KNOWN or len(token) > 24:
        return token
    for suffix in _SUFFIXES:
        root = token.removesuffix(suffix)
        if root != token and len(root) > 1:
            for form in (root, root + "e", root[:-1] if root[-1] == root[-2] else root, root.removesuffix("i") + "y"):
                if len(form) > 2 and form in _KNOWN:
                    return form
    return token


def examples() -> str:
    """What is understood, shortly: one word per operation, in both languages where there are two."""
    shown = []
    for _, english, chinese in _rows(_OPERATIONS):
        words = [cell.split(",")[0].strip().lstrip("~") for cell in (english, chinese) if cell]
        if words:
            shown.append(" ".join(words))
    return ", ".join(shown) + ", and colour words such as purple 紫色 and gold 金色"
