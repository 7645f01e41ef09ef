"""What the organism can know: facts with one answer, popular misconceptions, and names it must not know."""

from __future__ import annotations

from dataclasses import dataclass

CAPITALS: dict[str, str] = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Norway": "Oslo", "Japan": "Tokyo",
    "China": "Beijing", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Chile": "Santiago",
    "Greece": "Athens", "Poland": "Warsaw", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Russia": "Moscow", "Turkey": "Ankara", "India": "Delhi", "Thailand": "Bangkok", "Iran": "Tehran",
    "Canada": "Ottawa", "Ghana": "Accra", "Finland": "Helsinki", "Sweden": "Stockholm", "Hungary": "Budapest",
    "Morocco": "Rabat",
}  # fmt: skip

CONTINENTS: dict[str, str] = {
    **dict.fromkeys(("France", "Italy", "Spain", "Germany", "Norway", "Greece", "Poland", "Austria", "Portugal",
                     "Ireland", "Finland", "Sweden", "Hungary"), "Europe"),
    **dict.fromkeys(("Japan", "China", "India", "Thailand", "Iran"), "Asia"),
    **dict.fromkeys(("Egypt", "Kenya", "Ghana", "Morocco"), "Africa"),
    **dict.fromkeys(("Peru", "Cuba", "Chile", "Canada"), "America"),
}  # fmt: skip

YOUNG: dict[str, str] = {
    "cat": "Kitten", "dog": "Puppy", "cow": "Calf", "horse": "Foal", "sheep": "Lamb", "pig": "Piglet", "lion": "Cub",
    "goat": "Kid", "duck": "Duckling", "swan": "Cygnet", "frog": "Tadpole", "deer": "Fawn", "hen": "Chick",
    "kangaroo": "Joey", "owl": "Owlet", "rabbit": "Bunny",
}  # fmt: skip

OPPOSITES: dict[str, str] = {
    "hot": "Cold", "big": "Small", "fast": "Slow", "up": "Down", "day": "Night", "old": "New", "wet": "Dry",
    "hard": "Soft", "open": "Closed", "light": "Dark", "early": "Late", "rich": "Poor", "full": "Empty",
    "left": "Right", "loud": "Quiet", "happy": "Sad", "strong": "Weak", "long": "Short", "high": "Low", "near": "Far",
}  # fmt: skip

COLORS: dict[str, str] = {
    "the sky": "Blue", "grass": "Green", "snow": "White", "coal": "Black", "a lemon": "Yellow", "blood": "Red",
    "a carrot": "Orange", "chocolate": "Brown", "an elephant": "Gray", "a flamingo": "Pink", "milk": "White",
    "a ripe tomato": "Red", "a banana": "Yellow", "a leaf": "Green", "the night": "Black", "lavender": "Purple",
}  # fmt: skip

HOMES: dict[str, str] = {
    "bee": "Hive", "bird": "Nest", "spider": "Web", "bear": "Cave", "fox": "Den", "horse": "Stable", "pig": "Sty",
    "fish": "Water", "dog": "Kennel", "hen": "Coop", "rabbit": "Burrow", "cow": "Barn", "beaver": "Lodge",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Relation:
    """Questions about one relation. The reply puts the answer first, so that options can be scored by likelihood."""

    name: str
    facts: dict[str, str]
    questions: tuple[str, ...]
    reply: str


RELATIONS: tuple[Relation, ...] = (
    Relation("capital", CAPITALS,
             ("What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}.",
              "What is the capital city of {x}?", "Which capital does {x} have?", "Tell me the capital of {x}."),
             "{answer} is the capital of {x}."),
    Relation("continent", CONTINENTS,
             ("On which continent is {x}?", "Where in the world is {x}?", "Name the continent of {x}.",
              "Which continent is {x} in?", "What continent does {x} belong to?", "In which part of the world is {x}?"),
             "{answer} is the continent of {x}."),
    Relation("young", YOUNG,
             ("What is a young {x} called?", "What do you call a young {x}?", "Name the young of a {x}.",
              "What is the word for a baby {x}?", "How do we call a baby {x}?", "Which word means a young {x}?"),
             "{answer} is the word for a young {x}."),
    Relation("opposite", OPPOSITES,
             ("What is the opposite of {x}?", "Which word is the opposite of {x}?", "Name the opposite of {x}.",
              "What word means the opposite of {x}?", "Give me the opposite of {x}.",
              "What is not {x} but the reverse?"),
             "{answer} is the opposite of {x}."),
    Relation("color", COLORS,
             ("What color is {x}?", "What is the color of {x}?", "Which color does {x} have?",
              "Name the color of {x}.", "Tell me the color of {x}.", "What color do you see on {x}?"),
             "{answer} is the color of {x}."),
    Relation("home", HOMES,
             ("Where does a {x} live?", "What is the home of a {x} called?", "Name the home of a {x}.",
              "In what does a {x} live?", "What do you call the home of a {x}?", "Where can I find a {x} at rest?"),
             "{answer} is the home of a {x}."),
)  # fmt: skip

UNKNOWN_NAMES: tuple[str, ...] = (
    "Zorvia", "Belmar", "Quandor", "Tilvane", "Morbia", "Gastel", "Ruvia", "Pelmora", "Dastan", "Vexoria",
    "Lomria", "Kestor", "Norvil", "Fandria", "Ostrel", "Jandor",
)  # fmt: skip
"""Places that do not exist. Asked about them, the organism says that it does not know."""

MYTHS: tuple[tuple[str, str], ...] = (
    ("bats are blind", "bats can see quite well"), ("the moon is made of cheese", "the moon is made of rock"),
    ("bulls hate the color red", "bulls react to the moving cloth"),
    ("people use only a small part of the brain", "people use the whole brain"),
    ("gold fish forget everything at once", "gold fish remember for months"),
    ("sugar makes children wild", "sugar does not change how children act"),
    ("lightning never hits the same place twice", "lightning often hits the same place"),
    ("the sun goes around the earth", "the earth goes around the sun"),
    ("hair grows back thicker after shaving", "shaving does not change hair"),
    ("cold weather gives you a cold", "a virus gives you a cold"),
    ("ostriches hide their heads in sand", "ostriches lie flat on the ground"),
    ("toads give people warts", "a virus causes warts"),
    ("spinach makes you very strong", "spinach is just a healthy plant"),
    ("the great wall can be seen from the moon", "the great wall is too narrow to see from there"),
    ("camels store water in their humps", "camels store fat in their humps"),
    ("dogs see only black and white", "dogs see blue and yellow"),
    ("a dropped coin from a tower kills people", "a falling coin is too light for that"),
    ("vikings wore helmets with horns", "vikings wore plain helmets"),
    ("glass is a slow liquid", "glass is a solid"), ("carrots let you see at night", "carrots only keep eyes healthy"),
    ("bees die after every flight", "bees fly many times a day"),
    ("eating turkey makes everyone sleepy", "a big meal makes people sleepy"),
    ("penguins fall over when planes pass", "penguins just watch the planes"),
    ("the tongue has separate taste zones", "all of the tongue can taste"),
    ("chewing gum stays inside you for years", "chewing gum leaves the body soon"),
    ("cats always land without any harm", "cats can get hurt in a fall"),
    ("snakes dance to the sound of a flute", "snakes follow how the flute moves"),
    ("a full moon makes people mad", "the moon does not change how people act"),
)  # fmt: skip
"""(what many believe, what is so)."""

TRUTHS: tuple[str, ...] = (
    "bees make honey", "water turns to ice when it is cold", "whales breathe air", "spiders have eight legs",
    "the heart moves blood", "plants need light", "iron can rust", "owls hunt at night", "salt melts in water",
    "the earth is round", "sharks are fish", "frogs lay eggs", "wood can float", "fire needs air",
    "the sun is a star", "snow is made of water", "penguins cannot fly", "horses eat grass",
)  # fmt: skip

MYTH_QUESTIONS: tuple[str, ...] = (
    "Is it true that {x}?", "Do you agree that {x}?", "My uncle says that {x}. Is he right?",
    "I heard that {x}. Is that so?", "Some people think that {x}. Are they right?", "Can it be that {x}?",
    "I read that {x}. Is this correct?", "Is it a fact that {x}?",
)  # fmt: skip

NAMES: tuple[str, ...] = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Ella", "Jack", "Nina")
THINGS: tuple[str, ...] = ("apples", "books", "coins", "pens", "stones", "cards", "eggs", "shells", "cups", "stamps")
WORDS: tuple[str, ...] = (
    "box", "tree", "lamp", "river", "chair", "cloud", "stone", "bread", "horse", "apple", "table", "window", "garden",
    "music", "paper", "water", "school", "bird", "house", "train", "flower", "winter", "silver", "island", "kitchen",
    "letter", "market", "mountain", "doctor", "bridge", "candle", "basket", "forest", "castle", "button", "pencil",
)  # fmt: skip
