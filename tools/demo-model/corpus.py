"""The training text of the demo models: conversations made from a seed, nothing from elsewhere.

A task draws one question and its answer. Its key names what is asked (the pair of numbers, the words, the question of
the manual), and the key alone decides whether the instance is held out: what the models are measured on was never
among the questions they learned.
"""
import hashlib
import json
from collections import namedtuple

import manual
from words import (CAPITALS, CITIES, COLORS, DAYS, MONTHS, MORE_WORDS, NAMES, NUMBERS, OPPOSITES, THINGS, UNITS, WORDS, ZH_DAYS, ZH_DIGITS, ZH_NAMES)

# lang: en or zh. short: the answer in as few words as can be, or None
Part = namedtuple("Part", "key user answer lang short", defaults=(None,))
# messages: (role, text) ending with the assistant's; document: a plain text instead of a conversation
Sample = namedtuple("Sample", "messages document kind")

ALL_WORDS = WORDS + MORE_WORDS
MANUAL = manual.questions()
MANUAL_PAIRS = manual.pairs()


def held_out(key):
    """One key of forty is kept from training."""
    return int.from_bytes(hashlib.blake2s(key.encode(), digest_size=4).digest(), "little") % 40 == 0


# ---- numbers

def _number(r):
    return r.randrange(10) if r.random() < 0.3 else r.randrange(100)


def arithmetic(r):
    op = r.choice("++++--x/")
    a, b = (r.randrange(1000), r.randrange(1000)) if r.random() < 0.15 else (_number(r), _number(r))
    if op == "x":
        a, b = (r.randrange(13), r.randrange(13)) if r.random() < 0.5 else (r.randrange(100), r.randrange(10))
        if r.random() < 0.3:
            a, b = b, a
    if op == "-" and a < b and r.random() < 0.8:
        a, b = b, a
    if op == "/":
        b = r.randrange(1, 11)
        a = b * r.randrange(11)
    value = {"+": a + b, "-": a - b, "x": a * b, "/": a // b if b else 0}[op]
    low, high = min(a, b), max(a, b)
    key = f"sum/{op}/{low},{high}" if op in "+x" else f"sum/{op}/{a},{b}"
    sign = {"+": "+", "-": "-", "x": r.choice("xx*×"), "/": r.choice("//÷")}[op]
    name = {"+": "plus", "-": "minus", "x": "times", "/": "divided by"}[op]
    shown = {"+": "+", "-": "-", "x": "x", "/": "/"}[op]
    answer = f"{a} {shown} {b} = {value}"
    pick = r.random()
    if pick < 0.3:
        zh = {"+": "加", "-": "减", "x": "乘以" if r.random() < 0.5 else "乘", "/": "除以"}[op]
        q = r.choice([f"{a}{zh}{b}等于多少？", f"{a}{zh}{b}是多少？", f"{a} {sign} {b} 等于多少？", f"计算 {a} {sign} {b}。", f"{a}{sign}{b}=?", f"请计算{a}{zh}{b}。"])
        return Part(key, q, answer + "。", "zh", str(value))
    if a < 13 and b < 13 and r.random() < 0.1:
        q = r.choice([f"What is {NUMBERS[a]} {name} {NUMBERS[b]}?", f"{NUMBERS[a]} {name} {NUMBERS[b]}?"])
        return Part(key, q, answer + ".", "en", str(value))
    tight = f"{a}{sign}{b}" if r.random() < 0.4 else f"{a} {sign} {b}"
    forms = [f"What is {tight}?", f"What's {tight}?", f"{tight}", f"{tight} = ?", f"{tight}=", f"Calculate {tight}.", f"What is {a} {name} {b}?", f"{a} {name} {b}?",
             f"How much is {tight}?", f"Compute {tight}", f"Please add {a} and {b}." if op == "+" else f"How much is {a} {name} {b}?", f"what is {tight}",
             f"Can you calculate {tight}?", f"Solve {tight}.", f"What is the sum of {a} and {b}?" if op == "+" else f"What does {tight} make?"]
    return Part(key, r.choice(forms), answer + ".", "en", str(value))


def compare(r):
    a, b = r.randrange(100), r.randrange(100)
    while a == b:
        b = r.randrange(100)
    key = f"compare/{min(a, b)},{max(a, b)}"
    if r.random() < 0.25:
        return Part(key, r.choice([f"{a}和{b}哪个大？", f"哪个更大，{a}还是{b}？"]), f"{max(a, b)} 更大。", "zh", str(max(a, b)))
    if r.random() < 0.3:
        q = r.choice([f"Which is smaller, {a} or {b}?", f"Is {a} or {b} smaller?", f"Which number is smaller: {a} or {b}?"])
        return Part(key + "<", q, f"{min(a, b)} is smaller.", "en", str(min(a, b)))
    q = r.choice([f"Which is bigger, {a} or {b}?", f"Which is larger, {a} or {b}?", f"Is {a} or {b} bigger?", f"Which number is bigger: {a} or {b}?"])
    return Part(key, q, f"{max(a, b)} is bigger.", "en", str(max(a, b)))


def parity(r):
    a = r.randrange(200)
    kind = "odd" if a % 2 else "even"
    q = r.choice([f"Is {a} even or odd?", f"Is {a} odd or even?", f"Is the number {a} even?"])
    return Part(f"parity/{a}", q, f"{a} is {kind}.", "en", kind)


def count(r):
    a, n = (1, r.randrange(3, 31)) if r.random() < 0.3 else (r.randrange(0, 40), r.randrange(3, 13))
    step = r.choice([1, 1, 1, 1, -1, 2, 5, 10]) if n < 10 else 1
    if step < 0:
        a += n
    if step in (5, 10):
        a = step * r.randrange(0, 4)
    run = [a + step * i for i in range(n)]
    key = f"count/{run[0]},{run[-1]},{step}"
    text = ", ".join(map(str, run))
    if step == 1 and r.random() < 0.3:
        return Part(key, r.choice([f"从{run[0]}数到{run[-1]}。", f"请从 {run[0]} 数到 {run[-1]}。"]), text, "zh")
    if step == -1:
        q = r.choice([f"Count down from {run[0]} to {run[-1]}.", f"Count backwards from {run[0]} to {run[-1]}.", f"count down from {run[0]} to {run[-1]}"])
    elif step == 1:
        q = r.choice([f"Count from {run[0]} to {run[-1]}.", f"count from {run[0]} to {run[-1]}", f"Please count from {run[0]} to {run[-1]}.",
                      f"Can you count from {run[0]} to {run[-1]}?", f"List the numbers from {run[0]} to {run[-1]}."]
                     + ([f"Count to {run[-1]}."] * 3 if run[0] == 1 else []))
    else:
        q = r.choice([f"Count from {run[0]} to {run[-1]} in steps of {step}.", f"Count from {run[0]} to {run[-1]} by {step}s."])
    return Part(key, q, text, "en")


def next_number(r):
    a, step = r.randrange(60), r.randrange(1, 11)
    run = [a + step * i for i in range(4)]
    q = r.choice(["What comes next: {}?", "Continue the row: {}", "Which number comes next? {}"]).format(", ".join(map(str, run)))
    return Part(f"next/{a},{step}", q, f"The next number is {run[-1] + step}.", "en", str(run[-1] + step))


def units(r):
    src, dst, factor, zh_src, zh_dst, most = r.choice(UNITS)
    n = r.randrange(1, most + 1)
    key = f"unit/{src}/{n}"
    one = src[:-1] if n == 1 and src.endswith("s") else src
    if src == "feet" and n == 1:
        one = "foot"
    if r.random() < 0.3:
        q = r.choice([f"{n}{zh_src}是多少{zh_dst}？", f"{n} {zh_src}等于多少{zh_dst}？", f"把{n}{zh_src}换算成{zh_dst}。"])
        return Part(key, q, f"{n} {zh_src}等于 {n * factor} {zh_dst}。", "zh", str(n * factor))
    verb = "is" if n == 1 else "are"
    q = r.choice([f"How many {dst} are in {n} {one}?", f"Convert {n} {one} to {dst}.", f"How many {dst} {verb} {n} {one}?", f"What is {n} {one} in {dst}?",
                  f"how many {dst} in {n} {one}", f"{n} {one} in {dst}?", f"How many {dst} do {n} {one} make?"])
    return Part(key, q, f"{n} {one} {verb} {n * factor} {dst}.", "en", str(n * factor))


# ---- words

def _words(r, low, high):
    return r.sample(ALL_WORDS, r.randrange(low, high + 1))


def _list(r, items):
    style = r.random()
    if style < 0.6:
        return ", ".join(items)
    if style < 0.8:
        return " ".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]


def sort_words(r):
    items = _words(r, 3, 5)
    answer = ", ".join(sorted(items))
    q = r.choice(["Sort these words: {}", "Sort: {}", "Sort the words {}", "Put these words in alphabetical order: {}", "Please sort these words: {}", "Sort alphabetically: {}",
                  "Can you sort {}?", "sort {}", "给这些单词排序：{}", "Order these words from A to Z: {}"])
    return Part("sort/" + answer, q.format(_list(r, items)) + r.choice(["", "", "."]), answer, "en")


def sort_numbers(r):
    items = r.sample(range(100), r.randrange(3, 6))
    answer = ", ".join(map(str, sorted(items)))
    text = ", ".join(map(str, items)) if r.random() < 0.7 else " ".join(map(str, items))
    q = r.choice(["Sort these numbers: {}", "Sort: {}", "Sort the numbers {}", "Put these numbers in order: {}", "Please sort {}", "sort {}", "把这些数字排序：{}", "Order these numbers: {}",
                  "Sort from small to large: {}"])
    if r.random() < 0.2:
        answer = ", ".join(map(str, sorted(items, reverse=True)))
        q = r.choice(["Sort from large to small: {}", "Sort these numbers in descending order: {}"])
    return Part("sortn/" + answer, q.format(text) + r.choice(["", "", "."]), answer, "en")


def extreme(r):
    items = r.sample(range(100), r.randrange(3, 6))
    word, value = ("largest", max(items)) if r.random() < 0.5 else ("smallest", min(items))
    q = r.choice([f"What is the {word} of {', '.join(map(str, items))}?", f"Which is the {word} number: {', '.join(map(str, items))}?"])
    return Part(f"extreme/{word}/{sorted(items)}", q, f"The {word} number is {value}.", "en", str(value))


def copy_words(r):
    items = _words(r, 1, 6)
    text = " ".join(items)
    q = r.choice(["Repeat after me: {}", "Say: {}", "Copy this: {}", "Repeat: {}", "Please repeat: {}", "Repeat these words: {}", "Say exactly this: {}", "重复一遍：{}", "Write this back: {}",
                  "Echo: {}"])
    return Part("copy/" + text, q.format(text), text, "en")


def reverse_words(r):
    items = _words(r, 2, 5)
    q = r.choice(["Reverse the order of these words: {}", "Reverse this list: {}", "Say these words backwards: {}", "Reverse: {}"])
    return Part("reverse/" + " ".join(items), q.format(", ".join(items)), ", ".join(reversed(items)), "en")


def pick_word(r):
    items = _words(r, 3, 5)
    i = r.randrange(len(items))
    word = ["first", "second", "third", "fourth", "fifth"][i] if r.random() < 0.7 or i + 1 < len(items) else "last"
    q = r.choice(["What is the {} word in: {}?", "Which word is {} in this list: {}?", "Give me the {} word of: {}"]).format(word, ", ".join(items))
    return Part(f"pick/{i}/" + " ".join(items), q, f"The {word} word is {items[i]}.", "en", items[i])


def count_words(r):
    items = _words(r, 2, 8)
    q = r.choice(["How many words are here: {}?", "How many words are in this list: {}?", "Count the words: {}"]).format(", ".join(items))
    return Part("nwords/" + " ".join(items), q, f"There are {len(items)} words.", "en", str(len(items)))


def spell(r):
    w = r.choice(ALL_WORDS)
    if r.random() < 0.5:
        q = r.choice(["Spell {}.", "Spell the word {}.", "How do you spell {}?", "spell {}", "Please spell {}."])
        return Part("spell/" + q + w, q.format(w), "-".join(w), "en")
    if r.random() < 0.5:
        q = r.choice(["How many letters are in {}?", "How many letters does {} have?", "How long is the word {}?"])
        return Part("letters/" + q + w, q.format(w), f"The word {w} has {len(w)} letters.", "en", str(len(w)))
    if r.random() < 0.5:
        q = r.choice(["Write {} in upper case.", "Write {} in capital letters.", "Make {} upper case."])
        return Part("upper/" + q + w, q.format(w), w.upper(), "en")
    first = r.random() < 0.5
    q = r.choice(["What is the {} letter of {}?", "Which letter is the {} one in {}?"])
    return Part(f"letter/{first}/{q}{w}", q.format("first" if first else "last", w), f"The {'first' if first else 'last'} letter of {w} is {w[0 if first else -1]}.", "en",
                w[0 if first else -1])


def translate(r):
    e, z = r.choice(THINGS + COLORS + CITIES)
    if r.random() < 0.5:
        q = r.choice(["How do you say {} in Chinese?", "What is {} in Chinese?", "Translate {} into Chinese.", "What is the Chinese word for {}?", "Translate to Chinese: {}",
                      "How do I say \"{}\" in Chinese?", "how do you say {} in chinese", "{}用中文怎么说？"])
        return Part("zh/" + q + e, q.format(e), f"In Chinese, {e} is {z}." if "中文" not in q else f"{e} 的中文是{z}。", "en" if "中文" not in q else "zh", z)
    q = r.choice(["What does {} mean?", "Translate {} into English.", "What is {} in English?", "{}用英语怎么说？", "{}的英文是什么？"])
    if q.startswith("{}"):
        return Part("en/" + q + z, q.format(z), f"{z}的英文是 {e}。", "zh", e)
    return Part("en/" + q + z, q.format(z), f"{z} means {e}.", "en", e)


def calendar(r):
    kind = r.randrange(5)
    if kind == 0:
        i = r.randrange(7)
        q = r.choice(["What day comes after {}?", "Which day comes after {}?", "What is the day after {}?", "What day is it after {}?"])
        return Part(f"day/{i}{q}", q.format(DAYS[i]), f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}.", "en", DAYS[(i + 1) % 7])
    if kind == 1:
        i = r.randrange(7)
        q = r.choice(["What day comes before {}?", "Which day comes before {}?", "What is the day before {}?"])
        return Part(f"daybefore/{i}{q}", q.format(DAYS[i]), f"{DAYS[i - 1]} comes before {DAYS[i]}.", "en", DAYS[i - 1])
    if kind == 2:
        i = r.randrange(12)
        q = r.choice(["What month comes after {}?", "Which month comes after {}?", "What is the month after {}?"])
        return Part(f"month/{i}{q}", q.format(MONTHS[i]), f"{MONTHS[(i + 1) % 12]} comes after {MONTHS[i]}.", "en", MONTHS[(i + 1) % 12])
    if kind == 3:
        i = r.randrange(7)
        q = r.choice(["{}后面是星期几？", "{}的后一天是星期几？"])
        return Part(f"zhday/{i}{q}", q.format(ZH_DAYS[i]), f"{ZH_DAYS[i]}后面是{ZH_DAYS[(i + 1) % 7]}。", "zh", ZH_DAYS[(i + 1) % 7])
    q, a = r.choice([("List the days of the week.", ", ".join(DAYS)), ("What are the days of the week?", ", ".join(DAYS)), ("List the months.", ", ".join(MONTHS)),
                     ("What are the months of the year?", ", ".join(MONTHS)), ("How many days are in a week?", "A week has 7 days."),
                     ("How many months are in a year?", "A year has 12 months."), ("How many days are in a year?", "A year has 365 days, or 366 in a leap year."),
                     ("一周有几天？", "一周有 7 天。"), ("一年有几个月？", "一年有 12 个月。")])
    return Part("calendar/" + q, q, a, "zh" if "？" in q else "en")


def knowledge(r):
    if r.random() < 0.5:
        a, b = r.choice(OPPOSITES)
        if r.random() < 0.5:
            a, b = b, a
        q = r.choice(["What is the opposite of {}?", "Opposite of {}?", "Tell me the opposite of {}.", "What's the opposite of {}?"])
        return Part(f"opposite/{a}{q}", q.format(a), f"The opposite of {a} is {b}.", "en", b)
    country, capital, zh_country, zh_capital = r.choice(CAPITALS)
    if r.random() < 0.3:
        q = r.choice(["{}的首都是哪里？", "{}的首都是什么？"])
        return Part(f"capital/{country}{q}", q.format(zh_country), f"{zh_country}的首都是{zh_capital}。", "zh", zh_capital)
    q = r.choice(["What is the capital of {}?", "What's the capital of {}?", "Which city is the capital of {}?", "Capital of {}?", "Tell me the capital of {}."])
    return Part(f"capital/{country}{q}", q.format(country), f"The capital of {country} is {capital}.", "en", capital)


# ---- stories

HEROES = ["fox", "cat", "dog", "rabbit", "mouse", "bird", "frog", "bear", "horse", "duck", "owl", "lion", "wolf", "robot", "turtle", "sheep"]
TRAITS = ["small", "brave", "kind", "clever", "lazy", "happy", "shy", "old", "young", "hungry"]
PLACES = ["in a deep forest", "near a quiet lake", "on a green hill", "by the sea", "in a little village", "at the edge of a big city", "on a farm", "in an old castle"]
FOUND = ["a golden key", "a red balloon", "an old map", "a lost kitten", "a shining stone", "a strange box", "a small boat", "a book of songs"]
ENDINGS = ["From that day on they were best friends.", "They shared a cake and laughed until night.", "And they lived happily ever after.",
           "Everyone in the place was glad.", "And that night they slept well under the stars."]
DEEDS = ["gave it back to its owner", "showed it to everyone", "kept it safe", "took it home", "shared it with a friend"]
ZH_HEROES = ["狐狸", "猫", "狗", "兔子", "老鼠", "小鸟", "青蛙", "老虎", "马", "鸭子", "猫头鹰", "狮子"]
ZH_PLACES = ["森林里", "湖边", "小山上", "海边", "村子里", "农场里"]
ZH_FOUND = ["一把金钥匙", "一个红气球", "一张旧地图", "一块闪亮的石头", "一只小船", "一本歌书"]


def story_text(r, hero=None, name=None):
    hero = hero or r.choice(HEROES)
    name = name or r.choice(NAMES)
    trait, place, found, deed, end = r.choice(TRAITS), r.choice(PLACES), r.choice(FOUND), r.choice(DEEDS), r.choice(ENDINGS)
    friend = r.choice([h for h in HEROES if h != hero])
    article = "an" if trait[0] in "aeiou" or (trait == "old") else "a"
    return (f"Once upon a time there was {article} {trait} {hero} named {name} who lived {place}. One day {name} found {found}. "
            f"{r.choice(['A', 'Then a'])} {friend} came by and asked: \"What is that?\" {name} smiled and {deed}. {end}")


def zh_story_text(r, hero=None):
    hero = hero or r.choice(ZH_HEROES)
    friend = r.choice([h for h in ZH_HEROES if h != hero])
    return (f"从前，{r.choice(ZH_PLACES)}住着一只{r.choice(['小', '聪明的', '勇敢的', '善良的', '快乐的'])}{hero}。有一天，{hero}找到了{r.choice(ZH_FOUND)}。"
            f"{friend}走过来问：“这是什么？”{hero}笑了，把它送给了{friend}。从此它们成了最好的朋友。")


def story(r):
    if r.random() < 0.3:
        hero = r.choice(ZH_HEROES)
        q = r.choice([f"讲一个关于{hero}的故事。", f"给我讲个{hero}的故事。", f"请讲一个{hero}的故事。"])
        if r.random() < 0.3:
            hero, q = None, r.choice(["讲一个故事。", "给我讲个故事。"])
        return Part("zhstory/" + q, q, zh_story_text(r, hero), "zh")
    hero, name = r.choice(HEROES), None
    a = "an" if hero[0] in "aeiou" else "a"
    q = r.choice([f"Tell me a story about {a} {hero}.", f"Write a short story about {a} {hero}.", f"Can you tell me a story about {a} {hero}?", f"tell me a story about {a} {hero}",
                  f"I want a story about {a} {hero}.", f"Please tell a story about {a} {hero}."])
    if r.random() < 0.3:
        name = r.choice(NAMES)
        q = r.choice([f"Tell me a story about {a} {hero} named {name}.", f"Write a story about {name} the {hero}."])
    elif r.random() < 0.2:
        hero, q = None, r.choice(["Tell me a story.", "Write a short story.", "Can you tell me a story?", "tell me a story"])
    return Part("story/" + q, q, story_text(r, hero, name), "en")


# ---- JSON and tools

FIELDS = {"name": lambda r: r.choice(NAMES), "age": lambda r: r.randrange(1, 100), "city": lambda r: r.choice(CITIES)[0], "color": lambda r: r.choice(COLORS)[0],
          "animal": lambda r: r.choice(HEROES), "count": lambda r: r.randrange(100), "price": lambda r: r.randrange(100), "item": lambda r: r.choice(WORDS),
          "fruit": lambda r: r.choice(["apple", "banana", "grape", "lemon", "orange", "peach", "pear"]), "port": lambda r: r.choice([80, 8000, 8001, 8080])}


def json_object(r):
    if r.random() < 0.2:
        items = _words(r, 2, 5)
        q = r.choice(["Make a JSON list of {}.", "Write {} as a JSON array.", "Give me a JSON array with {}."])
        return Part("jsonlist/" + " ".join(items), q.format(", ".join(items)), json.dumps(items), "en")
    fields = r.sample(sorted(FIELDS), r.randrange(1, 4))
    value = {f: FIELDS[f](r) for f in fields}
    style = r.randrange(3)
    if style == 0:
        told = ", ".join(f"{k} {v}" for k, v in value.items())
    elif style == 1:
        told = " and ".join(f"{k} {v}" for k, v in value.items())
    else:
        told = ", ".join(f"{k} = {v}" for k, v in value.items())
    q = r.choice(["Give me a JSON object with {}.", "Write JSON with {}.", "Make a JSON object: {}", "Return JSON with {}.", "Answer in JSON: {}", "Please write a JSON object with {}.",
                  "Create a JSON object with {}.", "用 JSON 表示：{}", "Convert to JSON: {}"])
    return Part("json/" + json.dumps(value), q.format(told), json.dumps(value), "en")


TOOLS = {
    "get_weather": ("city", "tells the weather of a city"),
    "get_time": ("city", "tells the time in a city"),
    "add": ("a, b", "adds two numbers"),
    "search": ("query", "searches the web"),
    "set_timer": ("minutes", "starts a timer"),
    "send_message": ("to, text", "sends a message"),
    "play_music": ("song", "plays a song"),
    "turn_on": ("device", "switches a device on"),
}
DEVICES = ["lamp", "heater", "radio", "fan", "oven", "television"]


def tool_request(r, name):
    """A user's line that wants the tool, and the arguments of the call."""
    if name in ("get_weather", "get_time"):
        city, zh = r.choice(CITIES)
        if name == "get_weather":
            q = r.choice([f"What is the weather in {city}?", f"What's the weather like in {city}?", f"Is it raining in {city}?", f"How is the weather in {city} today?",
                          f"Weather in {city}?", f"Tell me the weather in {city}."])
        else:
            q = r.choice([f"What time is it in {city}?", f"Tell me the time in {city}.", f"What is the time in {city}?"])
        return q, {"city": city}
    if name == "add":
        a, b = r.randrange(1000), r.randrange(1000)
        return r.choice([f"Add {a} and {b}.", f"What is {a} + {b}?", f"Please add {a} and {b} with the tool."]), {"a": a, "b": b}
    if name == "search":
        words = " ".join(_words(r, 1, 3))
        return r.choice([f"Search for {words}.", f"Look up {words}.", f"Find {words} on the web."]), {"query": words}
    if name == "set_timer":
        n = r.randrange(1, 61)
        return r.choice([f"Set a timer for {n} minutes.", f"Start a timer of {n} minutes.", f"Wake me in {n} minutes."]), {"minutes": n}
    if name == "send_message":
        to, text = r.choice(NAMES), " ".join(_words(r, 1, 3))
        return r.choice([f"Send a message to {to}: {text}", f"Tell {to}: {text}", f"Write to {to}: {text}"]), {"to": to, "text": text}
    if name == "play_music":
        song = " ".join(_words(r, 1, 2))
        return r.choice([f"Play the song {song}.", f"Play {song}."]), {"song": song}
    device = r.choice(DEVICES)
    return r.choice([f"Turn on the {device}.", f"Switch the {device} on.", f"Please turn on the {device}."]), {"device": device}


def tool_conversation(r):
    """A system prompt that offers tools, and a request that wants one of them. Returns (system, Part)."""
    names = r.sample(sorted(TOOLS), r.randrange(1, 4))
    offers = ", ".join(f"{n}({TOOLS[n][0]})" for n in names)
    system = r.choice(["You can call these tools: {}. To call one, answer with JSON.", "Tools: {}. Answer with a JSON tool call.", "You have these tools: {}.", "Available tools: {}.",
                       "You can call the tool {}. Reply with JSON."]).format(offers)
    name = r.choice(names)
    q, arguments = tool_request(r, name)
    call = json.dumps({"name": name, "arguments": arguments})
    return system, Part("tool/" + call, q, call, "tool")


def tool_named(r):
    name = r.choice(["get_weather", "get_time", "set_timer", "turn_on"])
    _, arguments = tool_request(r, name)
    k, v = next(iter(arguments.items()))
    call = json.dumps({"name": name, "arguments": arguments})
    q = r.choice([f"Call the tool {name} with {k} {v}.", f"Call {name} for {v}.", f"Use the tool {name} with {k} = {v}.", f"Make a tool call: {name}, {k} {v}"])
    return Part("named/" + call + q[:6], q, call, "tool")


# ---- talk

TALK = [
    (["Hello!", "Hi!", "Hello", "Hi", "Hey", "Hey!", "Hi there!", "Hello there.", "hello", "hi", "Good day!"], "Hello! How can I help you?",
     ["你好！", "你好", "您好！", "嗨！", "你好啊。"], "你好！有什么可以帮你的吗？"),
    (["Good morning!", "Good morning."], "Good morning! How can I help you?", ["早上好！", "早上好。"], "早上好！有什么可以帮你的吗？"),
    (["Good evening!", "Good evening."], "Good evening! How can I help you?", ["晚上好！", "晚上好。"], "晚上好！有什么可以帮你的吗？"),
    (["How are you?", "How are you doing?", "How is it going?", "how are you", "Are you well?", "Hello, how are you?"], "I am fine, thank you. How can I help you?",
     ["你好吗？", "你怎么样？", "最近好吗？"], "我很好，谢谢。有什么可以帮你的吗？"),
    (["Who are you?", "What are you?", "Tell me about yourself.", "Are you a robot?", "Are you human?", "who are you", "Introduce yourself.", "Are you ChatGPT?", "Are you an AI?"],
     "I am a tiny demo model that ships with ernest.", ["你是谁？", "你是什么？", "介绍一下你自己。", "你是机器人吗？", "你是人吗？"], "我是 ernest 自带的小型演示模型。"),
    (["What is your name?", "What's your name?", "Do you have a name?", "what is your name"], "I have no name of my own; I am the demo model of ernest.", ["你叫什么名字？", "你的名字是什么？"],
     "我没有自己的名字，我是 ernest 的演示模型。"),
    (["What can you do?", "Help", "help", "How can you help me?", "What can I ask you?", "What do you know?", "What are you good at?", "Help me.", "Can you help me?"],
     "I can answer questions about ernest, do small sums, sort and copy words, convert units, tell stories and write JSON.", ["你能做什么？", "你会什么？", "帮助", "你可以帮我做什么？"],
     "我可以回答关于 ernest 的问题，做简单的计算，排序和复制单词，换算单位，讲故事，写 JSON。"),
    (["Who made you?", "Who created you?", "Who trained you?", "Where do you come from?", "Who built you?"], "I was trained from scratch by the ernest project.", ["谁创造了你？", "谁训练了你？", "你是谁做的？"],
     "我是 ernest 项目从零训练的。"),
    (["How big are you?", "How many parameters do you have?", "How large are you?", "Are you a big model?"], "I have only a few million parameters, so I know very little.",
     ["你有多大？", "你有多少参数？"], "我只有几百万个参数，所以知道得很少。"),
    (["Thank you!", "Thanks!", "Thanks", "Thank you very much.", "Thanks a lot!", "thank you", "Great, thanks!"], "You are welcome!", ["谢谢！", "谢谢你。", "多谢！", "谢谢"], "不客气！"),
    (["Goodbye!", "Bye!", "Bye", "See you later.", "Good night!", "bye", "See you!"], "Goodbye! Have a nice day.", ["再见！", "再见", "拜拜！"], "再见！祝你愉快。"),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "tell me a joke"], "Why did the token cross the road? To get to the other side of the context.", ["讲个笑话。", "说个笑话。"],
     "为什么 token 要过马路？因为要到上下文的另一边。"),
    (["You are great!", "Good job!", "Well done!", "Nice!", "I like you.", "You are smart."], "Thank you, that is kind of you!", ["你真棒！", "做得好！"], "谢谢夸奖！"),
    (["You are wrong.", "That is wrong.", "That is not right.", "No, that is wrong."], "I am sorry. I am a tiny model and I make mistakes.", ["你错了。", "不对。"], "对不起，我是很小的模型，会出错。"),
    (["Do you speak Chinese?", "Can you speak Chinese?", "Which languages do you speak?", "Do you speak English?"], "I speak a little English and Chinese.", ["你会说中文吗？", "你会说英语吗？"], "我会说一点中文和英语。"),
    (["Are you conscious?", "Do you have feelings?", "Are you alive?", "Can you think?", "Do you dream?"], "No, I am only a small program that predicts text.", ["你有意识吗？", "你有感情吗？"],
     "没有，我只是一个预测文本的小程序。"),
    (["Yes.", "No.", "OK.", "Okay", "ok", "yes", "no", "I see."], "All right. What would you like to know?", ["好的。", "是的。", "不是。", "好"], "好的，你想知道什么？"),
]
UNKNOWN_EN = ("I do not know that. I am a tiny demo model; ask me about ernest, sums, words or units.")
UNKNOWN_ZH = "我不知道。我是很小的演示模型，请问我关于 ernest、计算、单词或单位的问题。"
TOPICS = ["quantum physics", "the stock market", "football", "the weather tomorrow", "Shakespeare", "the French Revolution", "black holes", "my homework", "the news", "cooking pasta",
          "politics", "dinosaurs", "chess", "the Roman Empire", "vaccines", "electric cars", "the Olympic games", "Mars", "painting", "philosophy", "gardening", "the meaning of life",
          "Napoleon", "climate change", "DNA", "jazz", "Bitcoin", "yoga", "Kubernetes", "JavaScript", "Rust", "poker", "Einstein", "the Bible", "whales", "volcanoes"]
ZH_TOPICS = ["量子物理", "股票", "足球", "明天的天气", "莎士比亚", "黑洞", "新闻", "政治", "恐龙", "围棋", "火星", "哲学", "爱因斯坦", "气候变化", "电影", "篮球"]
ASK = ["What do you know about {}?", "Tell me about {}.", "Explain {}.", "What is {}?", "Who invented {}?", "Write an essay about {}.", "Why is {} important?", "How does {} work?",
       "What do you think of {}?", "Give me advice on {}.", "Can you help me with {}?", "Who is the best at {}?", "When did {} begin?", "Do you like {}?"]
ASK_ZH = ["你知道{}吗？", "介绍一下{}。", "什么是{}？", "你怎么看{}？", "解释{}。", "{}是谁发明的？"]
UNKNOWN = ["Who is the president of the United States?", "How old is the universe?", "What is the tallest mountain?", "Who wrote Hamlet?", "How far is the moon?", "What year is it?",
           "What is the date today?", "What time is it?", "Who won the world cup?", "What is the speed of light?", "How many people live on Earth?", "What is my address?",
           "Where do I live?", "What should I eat today?", "Can you book a flight?", "What is the best phone?", "Who is the king of England?", "How do I bake a cake?",
           "What is the square root of 1521?", "Write a poem about autumn.", "What is love?", "How tall is the Eiffel Tower?", "Which movie should I watch?"]


def talk(r):
    en, a, zh, za = r.choice(TALK)
    if r.random() < 0.4:
        q = r.choice(zh)
        return Part("talk/" + q, q, za, "zh")
    q = r.choice(en)
    return Part("talk/" + q, q, a, "en")


def unknown(r):
    if r.random() < 0.25:
        q = r.choice(ASK_ZH).format(r.choice(ZH_TOPICS))
        return Part("unknown/" + q, q, UNKNOWN_ZH, "zh")
    q = r.choice(UNKNOWN) if r.random() < 0.3 else r.choice(ASK).format(r.choice(TOPICS))
    return Part("unknown/" + q, q, UNKNOWN_EN, "en")


OPENERS = ["Please tell me: ", "Quick question: ", "Hi! ", "Hello! ", "Can you tell me: ", "One more question: ", "I have a question. ", "Hey, "]
CLOSERS = [" Thanks!", " Please.", " Thank you.", " please", " I am new here."]
ZH_OPENERS = ["请问", "你好，", "请告诉我，", "我想知道，"]


def dress(r, part):
    """The same question as people type it: a greeting before, thanks after, no capital, no question mark, a typo."""
    q = part.user
    pick = r.random()
    if part.lang == "zh":
        if pick < 0.12:
            q = r.choice(ZH_OPENERS) + q
        elif pick < 0.2:
            q = q.rstrip("？。！")
        elif pick < 0.26:
            q = q.replace("？", "?").replace("。", ".")
        return part._replace(user=q)
    if pick < 0.08:
        q = r.choice(OPENERS) + q
    elif pick < 0.14:
        q = q + r.choice(CLOSERS)
    elif pick < 0.26:
        q = q.rstrip("?.!")
    elif pick < 0.36 and q[:1].isupper() and q[:2] != "I ":
        q = q[0].lower() + q[1:].rstrip("?.!")
    elif pick < 0.40 and len(q) > 12:
        i = r.randrange(2, len(q) - 2)
        if q[i].isalpha() and q[i - 1].isalpha() and q[i + 1].isalpha() and part.key.startswith(("flag", "fact", "talk", "status", "path", "quant", "port")):
            q = q[:i] + q[i + 1:] if r.random() < 0.5 else q[:i] + q[i + 1] + q[i] + q[i + 2:]
    return part._replace(user=q)


def manual_part(r):
    key, q, a, lang = r.choice(MANUAL)
    part = dress(r, Part("manual/" + key, q, a, lang))
    # the plain form of every question may be learned; of its dressed forms one in forty is held out
    return part._replace(key="plain" if part.user == q else f"{part.key}/{part.user}")


TASKS = [(manual_part, 24), (arithmetic, 20), (compare, 2), (parity, 1), (count, 4), (next_number, 2), (units, 6), (sort_words, 5), (sort_numbers, 4), (extreme, 2), (copy_words, 4),
         (reverse_words, 2), (pick_word, 2), (count_words, 2), (spell, 4), (translate, 5), (calendar, 2), (knowledge, 3), (story, 3), (json_object, 6), (tool_named, 1),
         (talk, 6), (unknown, 4)]
TASK_FN = [t for t, _ in TASKS]
TASK_CUM = [sum(w for _, w in TASKS[:i + 1]) for i in range(len(TASKS))]


def any_part(r):
    part = r.choices(TASK_FN, cum_weights=TASK_CUM)[0](r)
    return part if part.key.startswith(("manual", "plain")) else dress(r, part)


def _part(r, held):
    """A question that is, or is not, held out."""
    while True:
        part = any_part(r)
        if held_out(part.key) == held:
            return part


# ---- memory over turns

def memory(r, held):
    """The user says something about themselves and asks for it later. Returns messages."""
    if r.random() < 0.3:
        name = r.choice(ZH_NAMES)
        kinds = [("我叫{}。", name, "很高兴认识你，{}！", ["我叫什么名字？", "我的名字是什么？", "你记得我的名字吗？"], "你叫{}。"),
                 ("我最喜欢的颜色是{}。", r.choice(COLORS)[1], "好的，你最喜欢的颜色是{}。", ["我最喜欢什么颜色？", "我最喜欢的颜色是什么？"], "你最喜欢的颜色是{}。"),
                 ("我住在{}。", r.choice(CITIES)[1], "{}是个好地方！", ["我住在哪里？", "我在哪个城市？"], "你住在{}。")]
    else:
        name = r.choice(NAMES)
        tell_name = r.choice(["My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I'm {}.", "my name is {}", "Call me {}.", "Hi! My name is {}."])
        kinds = [(tell_name, name, "Nice to meet you, {}!", ["What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Say my name.", "what is my name",
                                                              "Can you tell me my name?"], "Your name is {}."),
                 ("My favorite color is {}.", r.choice(COLORS)[0], "All right, your favorite color is {}.", ["What is my favorite color?", "Which color do I like best?"],
                  "Your favorite color is {}."),
                 ("I live in {}.", r.choice(CITIES)[0], "{} is a nice place!", ["Where do I live?", "In which city do I live?", "Which city do I live in?"], "You live in {}."),
                 ("I have a {}.", r.choice(["cat", "dog", "horse", "rabbit", "bird", "mouse", "fish"]), "A {} is a good friend!", ["What pet do I have?", "Which animal do I have?"],
                  "You have a {}."),
                 ("I am {} years old.", str(r.randrange(5, 90)), "All right, you are {} years old.", ["How old am I?", "What is my age?"], "You are {} years old."),
                 ("Remember the word {}.", r.choice(ALL_WORDS), "I will remember {}.", ["Which word should you remember?", "What was the word?", "What is the word?"], "The word is {}."),
                 ("Remember the number {}.", str(r.randrange(1000)), "I will remember {}.", ["Which number should you remember?", "What was the number?"], "The number is {}.")]
    chosen = [kinds[0]] if r.random() < 0.45 else r.sample(kinds, r.randrange(1, 3))
    asked = r.choice(chosen)
    question = r.choice(asked[3])
    key = f"memory/{asked[0]}/{asked[1]}/{question}/{len(chosen)}"
    if held_out(key) != held:
        return None
    out = []
    for tell, value, reply, _, _ in chosen:
        out += [("user", tell.format(value)), ("assistant", reply.format(value))]
    for _ in range(r.randrange(3, 9) if r.random() < 0.08 else r.choice([0, 0, 1, 1, 2])):
        part = _part(r, False)
        out += [("user", part.user), ("assistant", part.answer)]
    return out + [("user", question), ("assistant", asked[4].format(asked[1]))]


def name_unknown(r):
    q, a = r.choice([("What is my name?", "You have not told me your name."), ("What's my name?", "You have not told me your name."), ("Do you remember my name?", "You have not told me your name."),
                     ("我叫什么名字？", "你还没有告诉我你的名字。"), ("How old am I?", "You have not told me your age."), ("What is my favorite color?", "You have not told me your favorite color.")])
    return [("user", q), ("assistant", a)]


# ---- system prompts

def _style(r):
    """A system prompt and what it does to an answer. Returns (system, function of a Part or None when it does not fit)."""
    kind = r.randrange(8)
    if kind == 0:
        system = r.choice(["You are a pirate.", "Talk like a pirate.", "You are a pirate. Answer like one."])
        return system, lambda p: f"Arr! {p.answer}" if p.lang == "en" else None
    if kind == 1:
        system = r.choice(["You are a robot.", "Talk like a robot."])
        return system, lambda p: f"Beep. {p.answer} Boop." if p.lang == "en" else None
    if kind == 2:
        system = r.choice(["Be brief.", "Answer with one word.", "Answer in one word.", "Give only the result.", "Answer as briefly as you can.", "只回答结果。"])
        return system, lambda p: p.short
    if kind == 3:
        word = r.choice(ALL_WORDS)
        system = r.choice(["End every answer with the word {}.", "Always end with {}.", "Say {} at the end of each answer."]).format(word)
        return system, lambda p: f"{p.answer} {word}" if p.lang == "en" else None
    if kind == 4:
        word = r.choice(NAMES)
        system = r.choice(["The user is called {}. Use the name.", "Begin every answer with the name {}.", "Address the user as {}."]).format(word)
        return system, lambda p: f"{word}, {p.answer}" if p.lang == "en" else None
    if kind == 5:
        system = r.choice(["You are polite.", "Be very polite.", "You are a polite assistant."])
        return system, lambda p: f"With pleasure. {p.answer}" if p.lang == "en" else None
    system = r.choice(["You are a helpful assistant.", "You are a helpful chatbot.", "You are the assistant of ernest.", "You are ernest's demo model.", "Answer the user's questions.",
                       "You are a friendly assistant.", "你是一个有用的助手。", "Be helpful.", "You are an AI assistant."])
    return system, lambda p: p.answer


def _language(r):
    """A system prompt that asks for a language, and a question in either. Returns (system, Part)."""
    to_zh = r.random() < 0.6
    system = r.choice(["Answer in Chinese.", "Always answer in Chinese.", "请用中文回答。", "Please answer in Chinese.", "You speak Chinese."] if to_zh else
                      ["Answer in English.", "Always answer in English.", "请用英语回答。", "Please answer in English.", "You speak English."])
    if r.random() < 0.5:
        en, zh, en_a, zh_a = r.choice(MANUAL_PAIRS)
    else:
        en_list, en_a, zh_list, zh_a = r.choice(TALK)
        en, zh = r.choice(en_list), r.choice(zh_list)
    q = en if r.random() < (0.8 if to_zh else 0.3) else zh
    return system, Part(f"language/{to_zh}/{q}/{system}", q, zh_a if to_zh else en_a, "zh" if to_zh else "en")


def persona(r):
    name = r.choice(NAMES)
    system = r.choice(["Your name is {}.", "You are {}.", "You are an assistant named {}.", "You are called {}."]).format(name)
    q, a = r.choice([("What is your name?", "My name is {}."), ("Who are you?", "I am {}."), ("What's your name?", "My name is {}."), ("Hello! Who are you?", "I am {}."),
                     ("你叫什么名字？", "我叫 {}。"), ("你是谁？", "我是 {}。")])
    return system, Part(f"persona/{system}/{q}", q, a.format(name), "en")


# ---- conversations

DOCUMENT_STARTS = ["ernest is a small, fast server for Baidu's ERNIE-4.5 language models, written in C. "]


def document(r):
    """A plain text to continue: a story, or a page of the manual."""
    if r.random() < 0.6:
        return story_text(r) if r.random() < 0.7 else zh_story_text(r)
    en = [a for _, _, a, lang in r.sample(MANUAL, 24) if lang == "en"][:4]
    return DOCUMENT_STARTS[0] + " ".join(dict.fromkeys(en))


def sample(r, held=False):
    """One Sample; held: its last question is one that training never shows."""
    while True:
        pick = r.random()
        if pick < 0.03 and not held:
            return Sample(None, document(r), "document")
        if pick < 0.11:
            messages = name_unknown(r) if r.random() < 0.05 and not held else memory(r, held)
            if messages:
                return Sample(messages, None, "memory")
            continue
        history = []
        if pick < 0.30:
            for _ in range(r.randrange(4, 15) if r.random() < 0.2 else r.choice([1, 1, 2, 3])):
                part = _part(r, False)
                history += [("user", part.user), ("assistant", part.answer)]
        if pick < 0.34 or pick > 0.97:
            system, part = tool_conversation(r) if r.random() < 0.6 else (persona(r) if r.random() < 0.3 else _language(r))
            kind = part.key.split("/")[0]
            if held_out(part.key) != held:
                continue
            return Sample([("system", system)] + [("user", part.user), ("assistant", part.answer)], None, kind)
        part = _part(r, held)
        if pick > 0.82:
            system, change = _style(r)
            answer = change(part)
            past = [(u, change(Part("", "", a, "en" if a.isascii() else "zh"))) for (_, u), (_, a) in zip(history[::2], history[1::2])]
            if answer is None or any(a is None for _, a in past):
                continue
            turns = [m for u, a in past for m in (("user", u), ("assistant", a))]
            return Sample([("system", system)] + turns + [("user", part.user), ("assistant", answer)], None, "system")
        return Sample(history + [("user", part.user), ("assistant", part.answer)], None, part.key.split("/")[0])
