class PackedWeight:
    def __init__(
        self,
        packed: int,
        rows: int,
        columns: int,
        bits: int,
        group_size: int,
        scale: int,
        scale_by_row: bool,
        scale_by_group: bool,
        choice: int,
        choice_by_row: bool,
        choice_by_group: bool,
        significands: int,
        steps: int,
        books: int,
        magnitude_bits: int,
        max_run: int,
        is_signed: bool,
        input_group_size: int,
    ) -> None: ...
    def linear(
        self,
        x: int,
        rows: int,
        y: int,
        bias: int,
        scale: int,
        offset: int,
        reach: float,
        threads: int,
        activation: int,
        /,
    ) -> None: ...
    def dequantize(self, out: int, threads: int, /) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def storage(self) -> int: ...
    @property
    def kind(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

_Product = tuple[PackedWeight, int, int, int, float]

def feed_forward(
    first: list[_Product],
    down: _Product,
    activation: int,
    x: int,
    rows: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def isa() -> str: ...
def available() -> list[str]: ...
def use(name: str) -> None: ...
