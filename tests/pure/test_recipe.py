"""Prompts, English and Chinese, become recipes; what cannot be read is refused with what can."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidParameter
from core.recipe import find_operations, named, read_prompt, read_recipe
from core.vocabulary import COLOURS, LEXICON, STAGES

CLIENT_PROMPTS = {
    "Change the colors to purple and gold with magical sparkles": {"tint", "sparkles"},
    "Transform into a sunset scene with warm orange and pink colors": {"sunset", "warmer", "tint"},
    "Make it look like a winter landscape with snow and ice": {"winter"},
    "Convert to a vibrant spring garden with flowers and butterflies": {"spring", "vivid"},
    "Create a futuristic cyberpunk style with neon lights": {"cyberpunk"},
    "Transform into an underwater scene with fish and coral": {"underwater"},
    "Make it look like an autumn forest with falling leaves": {"autumn"},
    "Convert to a space scene with stars and nebula": {"space"},
    "Create a medieval castle scene with dragons": {"medieval"},
    "Transform into a tropical beach with palm trees": {"tropical"},
    "Make it look like a steampunk machine": {"steampunk"},
    "Convert to a fantasy forest with magical creatures": {"fantasy"},
    "Create a post-apocalyptic wasteland scene": {"wasteland"},
    "Transform into a Japanese zen garden": {"zen"},
    "Make it look like a colorful abstract painting": {"vivid", "abstract"},
    "Convert to a retro 80s style with bright colors": {"retro80s", "vivid"},
}


def read(prompt: str, negative: str = "") -> dict[str, float]:
    return {step.name: step.params["strength"] for step in read_recipe(prompt, negative)}


@pytest.mark.parametrize("prompt", CLIENT_PROMPTS)
def test_a_prompt_of_the_existing_client_is_read(prompt: str) -> None:
    assert set(read(prompt)) == CLIENT_PROMPTS[prompt]


def test_a_prompt_with_two_colours_names_both() -> None:
    recipe = read_recipe("Change the colors to purple and gold")
    assert recipe[0].params["colours"] == ["purple", "gold"]


@pytest.mark.parametrize(
    ("english", "chinese", "operation"),
    [
        ("watercolor", "变成水彩画", "watercolour"),
        ("an oil painting", "油画风格", "oil"),
        ("pencil sketch", "素描", "sketch"),
        ("ink wash painting", "水墨画", "ink"),
        ("at night", "改成夜晚", "night"),
        ("warmer", "暖一点的色调", "warmer"),
        ("cooler", "冷色调", "cooler"),
        ("brighten it", "调亮", "brighter"),
        ("darken", "变暗", "darker"),
        ("sharper", "更清晰", "sharpen"),
        ("blur the background", "背景虚化", "blur_background"),
        ("black and white", "黑白照片", "black_and_white"),
        ("more vibrant", "颜色更鲜艳", "vivid"),
        ("old photo", "老照片", "vintage"),
        ("cartoon", "漫画风", "comic"),
        ("soft focus", "柔和", "soft"),
        ("raise the contrast", "提高对比度", "contrast"),
        ("snowy", "下雪的冬天", "winter"),
        ("cyberpunk", "赛博朋克", "cyberpunk"),
        ("mirrored", "左右翻转", "mirror"),
        ("pixel art", "像素风", "pixelate"),
        ("a purple tint", "紫色", "tint"),
    ],
)
def test_both_languages_name_the_same_operation(english: str, chinese: str, operation: str) -> None:
    assert operation in read(english)
    assert operation in read(chinese)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("slightly warmer", {"warmer": 0.4}),
        ("very dark", {"darker": 1.5}),
        ("extremely vivid", {"vivid": 2.0}),
        ("50% blur", {"blur": 0.5}),
        ("make it warmer by 20%", {"warmer": 0.2}),
        ("vignette 30%, brighter", {"vignette": 0.3, "brighter": 1.0}),
        ("very warm and bright", {"brighter": 1.5, "warmer": 1.5}),
        ("very warm. bright", {"brighter": 1.0, "warmer": 1.5}),
        ("500% blur", {"blur": 2.0}),
        ("0% blur", {"blur": 0.05}),
        ("稍微暗一点", {"darker": 0.5}),
        ("非常鲜艳的油画", {"vivid": 1.5, "oil": 1.0}),
        ("暖一点亮一点", {"brighter": 0.5, "warmer": 0.5}),
        ("亮度增加50％", {"brighter": 0.5}),
        ("bright -1000%", {"darker": 2.0}),
        ("brightness −20%", {"darker": 0.2}),
        ("-20% contrast, warmer", {"flat": 0.2, "warmer": 1.0}),
        ("make it warmer by -30%", {"cooler": 0.3}),
        ("10-20% brighter", {"brighter": 0.2}),
    ],
)
def test_degrees_set_the_strength_of_the_operation_they_stand_at(prompt: str, expected: dict[str, float]) -> None:
    assert read(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("sharper, don't make it darker", {"sharpen"}),
        ("sepia without grain or vignette", {"sepia"}),
        ("do not blur the background and make it warmer", {"warmer"}),
        ("no blur but a sunset", {"sunset"}),
        ("水墨风格，不要太暗", {"ink"}),
        ("不要模糊，清晰", {"sharpen"}),
        ("oil painting at night with no stars", {"night", "oil"}),
        ("not only brighter but warmer", {"brighter", "warmer"}),
    ],
)
def test_a_negation_holds_to_the_end_of_its_clause(prompt: str, expected: set[str]) -> None:
    assert set(read(prompt)) == expected


def test_not_too_bounds_what_was_asked_for() -> None:
    assert read("brighter, but not too bright") == {"brighter": 0.5}


def test_less_of_something_is_its_opposite() -> None:
    prompt = "less warm, reduce the contrast, lower the saturation, 降低亮度"
    assert set(read(prompt)) == {"cooler", "flat", "muted", "darker"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("flip it horizontally", {"mirror": 1.0}), ("flip this photo horizontally please", {"mirror": 1.0}),
        ("flip the picture left to right", {"mirror": 1.0}), ("mirror it vertically", {"flip": 1.0}),
        ("mirror it and flip it vertically", {"mirror": 1.0, "flip": 1.0}),
        ("flip it vertically and horizontally", {"mirror": 1.0, "flip": 1.0}),
        ("flip it horizontally and make it brighter", {"mirror": 1.0, "brighter": 1.0}),
        ("flip it and blur from left to right", {"flip": 1.0, "blur": 1.0}),
        ("flip it", {"flip": 1.0}), ("rotate the picture by 180 degrees", {"rotate": 1.0}),
    ],
)  # fmt: skip
def test_a_direction_counts_wherever_it_stands(prompt: str, expected: dict[str, float]) -> None:
    assert read(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("it is too dark", {"brighter": 1.0}), ("the photo is too bright", {"darker": 1.0}),
        ("this picture is too cold", {"warmer": 1.0}), ("太亮了", {"darker": 1.0}), ("照片太暗", {"brighter": 1.0}),
        ("too dark, brighten it", {"brighter": 1.0}), ("太暗了，调亮一点", {"brighter": 0.5}),
        ("too blurry, sharpen it", {"sharpen": 1.0}),
        ("make it brighter too and warmer", {"brighter": 1.0, "warmer": 1.0}),
    ],
)  # fmt: skip
def test_a_complaint_asks_for_the_opposite(prompt: str, expected: dict[str, float]) -> None:
    assert read(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "operation"),
    [
        ("消除噪点", "smooth"), ("去除噪点", "smooth"), ("去掉噪点", "smooth"), ("去噪点", "smooth"),
        ("make it black & white", "black_and_white"), ("black&white photo", "black_and_white"),
        ("no colour", "black_and_white"), ("remove all colours", "black_and_white"), ("less colour", "muted"),
        ("make the background blurry", "blur_background"), ("the background should be blurred", "blur_background"),
        ("make background out of focus", "blur_background"),
    ],
)  # fmt: skip
def test_ordinary_ways_to_say_it_are_understood(prompt: str, operation: str) -> None:
    assert read(prompt) == {operation: 1.0}


@pytest.mark.parametrize("prompt", ["去雾", "去雾一下", "too much fog", "the sky is too dark"])
def test_what_cannot_be_taken_away_is_not_added(prompt: str) -> None:
    with pytest.raises(InvalidParameter):
        read_recipe(prompt)


def test_a_plus_is_a_degree() -> None:
    assert read("brightness +30%") == read("亮度+30%") == {"brighter": 0.3}


def test_a_weak_word_gives_way_to_a_strong_one() -> None:
    assert set(read("a forest")) == {"forest"}
    assert set(read("an autumn forest")) == {"autumn"}
    assert set(read("a watercolour painting")) == {"watercolour"}


def test_the_negative_prompt_takes_operations_and_colours_out() -> None:
    assert set(read("warm watercolour with sparkles", "blurry, watercolor, low quality")) == {"warmer", "sparkles"}
    recipe = read_recipe("purple and gold", "gold")
    assert recipe[0].params["colours"] == ["purple"]
    assert named("不要模糊，blur") == {"blur"}


def test_operations_come_in_the_order_of_the_vocabulary_whatever_the_prompt_says() -> None:
    one = [step.name for step in read_recipe("vignette, oil painting, warmer, sunset, mirror")]
    other = [step.name for step in read_recipe("mirror, sunset, warmer, oil painting, vignette")]
    assert one == other == sorted(one, key=list(STAGES).index)


@pytest.mark.parametrize("prompt", ["", "   ", "hello there", "你好", "!!!", "teh qick brwon fox jmps", "olive oil"])
def test_a_prompt_without_a_known_word_is_refused_with_what_is_known(prompt: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read_recipe(prompt)
    assert "watercolour 水彩画" in caught.value.message
    assert len(caught.value.message) < 1200
    assert find_operations(prompt) == ()


def test_a_prompt_that_only_forbids_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="what not to do"):
        read_recipe("don't make it darker")


def test_words_inside_words_are_not_found() -> None:
    for prompt in ("a redundant story", "warmonger", "nicety", "月亮很漂亮"):
        assert find_operations(prompt) == (), prompt


def test_every_phrase_of_the_vocabulary_names_something_real() -> None:
    for phrase, term in LEXICON.items():
        assert term.kind != "op" or term.name in STAGES, phrase
        assert term.kind != "colour" or term.name in COLOURS, phrase
    assert {term.name for term in LEXICON.values() if term.kind == "op"} == set(STAGES) - {"tint"}


FOR_ONE_THING = (
    "make eyes green", "make the eyes green", "make her eyes more green", "red dress", "a red dress",
    "give her a red dress", "change the dress to red", "turn the car blue", "paint the car blue", "her hair is gold",
    "blue eyes", "turn the sky blue", "make the sky darker", "brighten her face", "brighten up her face",
    "sharpen the eyes", "blur the car", "whiter and brighter teeth", "raise the saturation of her lips",
    "change the color of her eyes to green", "add a red hat", "eyes green", "make the background blue",
    "make the dog's fur brown", "red and blue dress", "a purple dragon", "眼睛变绿", "把眼睛变成绿色", "红色的裙子",
    "红裙子", "头发染成金色", "把天空调亮", "蓝色汽车", "天空更蓝", "提亮肤色", "明亮的眼睛", "让眼睛明亮一点",
    "把衣服换成红色", "more contrast in the eyes", "make eyes 50% brighter", "her eyes should be green", "dark eyes",
    "make the whole dress red", "colour her lips red", "turn the red car blue", "make her lips red and eyes blue",
    "把头发颜色改成金色", "让照片中的花更鲜艳", "a woman wearing red", "make the eyes in the photo brighter",
    "change the hair color to gold", "make\teyes\ngreen", "green for the eyes", "car: blue", "the car, make it blue",
    "make it red, the car", "the car. make it red", "眼睛 make green", "make her red", "make her look green",
    "把她变红",
    "black and white cat", "make the cat black and white", "a star on the flag", "ink on her arm",
    "a flower on her dress",
    # things that are called as a mood is, and those whose name holds one
    "red flowers", "make the snow yellow", "把雪变成红色", "brighten the flowers", "yellow snow", "blue ice",
    "add red flowers", "红色的花朵", "让雪更亮", "把花朵变红", "the flowers should be purple", "flowers purple",
    "make the stars brighter", "make the snow less bright", "make the castle red", "turn the sea green",
    "把森林变成红色", "make the beach brighter", "snow leopard", "雪豹", "red winter coat", "a red summer dress",
    "night owl", "ice cube", "雪人", "smooth skin", "smooth her skin", "make the skin smooth", "平滑皮肤",
    "the eyes, make it brighter", "her eyes, make it sharper", "眼睛，让它更亮",
)
FOR_THE_PICTURE = (
    "make it green", "make everything blue", "make the whole image green", "make the picture of my cat brighter",
    "a warm light", "bright colors", "a purple tint", "red tones", "make the photo warmer", "please make it brighter",
    "beautiful warm light", "make it beautiful and bright", "make it nicely warm", "a dark moody street", "purple",
    "red", "sky blue", "make it sky blue", "purple and gold", "Change the colors to purple and gold",
    "warm orange and pink colors", "一张暖色照片", "让画面更亮", "把图片调亮", "颜色更鲜艳", "整体偏暖", "清新明亮",
    "明亮清新", "柔和唯美", "柔和的光线", "暖一点的色调", "紫色", "紫色调", "改成夜晚", "更清晰", "红色的光",
    "请把照片调得亮一些", "变成蓝色", "把照片变成蓝色", "black and white portrait of a woman", "a castle with dragons",
    "sunset with a red car", "a cat, oil", "sharp and detailed", "high quality, detailed, sharp",
    "brighter for instagram", "make it look golden", "golden hour", "soft focus portrait", "vivid landscape",
    "dramatic lighting", "a bit more blue", "more red", "add a blue tint", "I want my photo to look warm", "blur",
    "深蓝色", "加一点红色", "蓝色风格", "make this green", "turn it red", "watercolour of a boat",
    "orange sunset over the sea", "green forest", "make it brighter and sharper please",
    "make my photo pop with vivid colors", "red light", "a green picture", "make colors warmer",
    "make the light warmer", "oil on canvas", "ink on paper", "black and white", "turn her portrait blue",
    "make me a warm picture", "a purple look for my cat's picture", "snow on the roofs", "winter landscape with snow",
    "a warm sunset", "make it warmer", "水彩画", "black and white street", "watercolour of a star on the flag",
    "snow", "雪", "flowers", "stars", "cold snow", "soft snow in winter", "a dark forest", "a dark castle",
    "blue ocean", "pink cherry blossoms", "粉色樱花", "a colorful flower garden", "a snow scene in blue",
    "bright snowy day", "ice blue", "the forest is dark and green", "add snow, darker", "make it snow, brighter",
    "make the picture of the snow brighter", "snow mountain", "雪山", "cyberpunk girl", "a vintage dress", "smooth",
    "smooth everything", "磨皮", "smooth lines", "hello, make it brighter", "你好，让它更亮", "black and white film",
    "purple neon lights", "a knight in a castle",
)


@pytest.mark.parametrize("prompt", FOR_ONE_THING)
def test_a_colour_or_a_degree_of_one_thing_never_changes_the_whole_picture(prompt: str) -> None:
    with pytest.raises(InvalidParameter, match="whole picture") as caught:
        read_recipe(prompt)
    assert "watercolour 水彩画" in caught.value.message and len(caught.value.message) < 1400
    assert caught.value.details["parameter"] == "prompt" and caught.value.details["ignored"]
    assert find_operations(prompt) == ()


@pytest.mark.parametrize("prompt", FOR_THE_PICTURE)
def test_what_is_meant_for_the_picture_is_done(prompt: str) -> None:
    assert read_recipe(prompt)


@pytest.mark.parametrize(
    ("prompt", "done", "ignored"),
    [
        ("a castle with dragons", {"medieval"}, ["dragons"]),
        ("a sunset, and make her eyes green", {"sunset"}, ["eyes", "green"]),
        ("winter, a red car, a red car", {"winter"}, ["red", "car"]),
        ("下雪的冬天，红色的裙子", {"winter"}, ["红色", "裙子"]),
        ("make it warmer", {"warmer"}, []),
        ("a beautiful warm street", {"warmer"}, ["beautiful", "street"]),
        ("让照片亮一点", {"brighter"}, []),
        ("sepia !!! & qwertz", {"sepia"}, ["qwertz"]),
        ("a garden with red flowers", {"spring"}, ["red", "flowers"]),
        ("night, and make the snow yellow", {"night"}, ["snow", "yellow"]),
        ("sunset, make the sky green", {"sunset"}, ["sky", "green"]),
        ("golden sunset with orange and pink sky", {"sunset", "tint"}, ["sky"]),
        ("金色的夕阳，橙色和粉色的天空", {"sunset", "tint"}, ["天空"]),
        ("golden autumn leaves", {"autumn", "tint"}, ["leaves"]),
        ("moody sunset with dark clouds", {"sunset", "darker"}, ["clouds"]),
        ("high contrast black and white film noir", {"contrast", "black_and_white"}, []),
    ],
)
def test_words_without_effect_are_told(prompt: str, done: set[str], ignored: list[str]) -> None:
    recipe, told = read_prompt(prompt)
    assert {step.name for step in recipe} == done and told == ignored


def test_what_is_told_is_bounded() -> None:
    _, told = read_prompt("sepia " + " ".join(f"word{'x' * number}" for number in range(100)))
    assert len(told) <= 32 and max(map(len, told)) <= 32


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    try:
        recipe = read_recipe(text)
    except InvalidParameter:
        return
    assert all(0.05 <= step.params["strength"] <= 2.0 for step in recipe)


@given(st.lists(st.sampled_from(sorted(" ".join(p) for p in LEXICON)), max_size=12))
def test_any_row_of_known_words_is_read_the_same_twice(words: list[str]) -> None:
    assert find_operations(" ".join(words)) == find_operations(" ".join(words))


def test_the_longest_prompt_is_read_in_linear_time() -> None:
    assert set(read("very warm, " * 700 + "sepia")) == {"warmer", "sepia"}
    assert set(read("red flowers, " * 190 + "sepia")) == {"sepia"}


def test_the_documentation_lists_every_operation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in STAGES if f"| {STAGES[name]} | `{name}` |" not in text] == []
