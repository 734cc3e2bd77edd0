"""Words that retrieval tasks hide: everyday ones, so that small models can repeat them."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter blue bold brave brief bright broad calm clever cold crimson curious "
    "dark deep distant dusty eager early empty famous fancy fierce flat fresh gentle giant golden "
    "grand green happy heavy hidden hollow humble icy jolly kind large lazy light little lonely "
    "loud lucky mellow mighty modern narrow noble old pale plain polite proud purple quick quiet "
    "rapid rare red rough round royal rusty sharp shiny silent silver simple sleepy slow small "
    "smooth soft solid sour spicy steep strange strong sunny sweet swift tall tender thick thin "
    "tiny warm wide wild wise young"
)

NOUNS = _words(
    "anchor apple arrow badge banana barrel basket beach bell bird blanket boat book bottle "
    "bridge bucket button cabin camera candle canyon carpet castle chair cherry circle clock "
    "cloud coat coin copper cradle desert dinner doctor dragon drum eagle engine falcon feather "
    "fence field finger flag flower forest fountain garden glass glove guitar hammer harbor hat "
    "honey horse house island jacket jungle kettle key kitchen ladder lake lamp lemon letter lion "
    "market meadow mirror monkey mountain needle ocean onion orange painter palace paper parrot "
    "pencil pepper piano pillow planet pocket potato queen rabbit ribbon river rocket saddle "
    "school shadow sheep shell ship spoon station stone street table temple ticket tiger tower "
    "train turtle valley violin wagon wallet window winter wolf"
)
