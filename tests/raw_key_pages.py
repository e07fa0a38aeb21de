"""What the tests of key convolution over a block table share: a server that keeps raw keys, and whole sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from paging import Server
from torch import Tensor, nn

from openmoba.ops.key_conv import key_convolution
from openmoba.ops.raw_keys import NewTokens, convolve_paged, new_raw_keys


class Kept:
    """A server, filters, and the raw keys beside its pages; what nobody wrote is NaN."""

    def __init__(
        self,
        page_size: int = 8,
        width: int = 4,
        pages: int = 200,
        device: str = "cpu",
        operation: Callable[..., None] = convolve_paged,
    ) -> None:
        self.operation = operation
        self.server = Server(page_size, 1, pages=pages, device=device)
        self.weight = self.server.draw(self.server.kv_heads * self.server.width, width)
        self.raw_keys = new_raw_keys(len(self.server.pool), self.weight, torch.float64).fill_(float("nan"))

    def grow(self, news: dict[int, int]) -> None:
        """Let requests grow, and convolve."""
        for request, new in news.items():
            self.server.write(request, new)
        self.check(news)

    def check(self, news: dict[int, int]) -> None:
        """Convolve the last tokens of requests, in one batch: each as in its whole sequence."""
        got = self.convolve(**self.call(news))
        expected = torch.cat([self.whole(request, new) for request, new in news.items()])
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)

    def call(self, news: dict[int, int]) -> dict[str, Tensor]:
        """What vLLM says of a batch of the last tokens of requests, and their keys."""
        server, tables = self.server, [self.server.tables[request] for request in news]
        block_table = nn.utils.rnn.pad_sequence([torch.tensor(x) for x in tables], True, -1).int()
        lengths = torch.tensor([len(server.keys[request]) for request in news])
        slots = [
            torch.tensor(table)[position // server.page_size] * server.page_size + position % server.page_size
            for table, length, new in zip(tables, lengths, news.values(), strict=True)
            for position in [torch.arange(int(length) - new, int(length))]
        ]
        batch = {
            "block_table": block_table,
            "lengths": lengths.int(),
            "starts": torch.tensor([0, *news.values()]).cumsum(0).int(),
            "slots": torch.cat(slots),
        }
        keys = torch.cat([server.keys[request][-new:] for request, new in news.items()]).flatten(1)
        return {"keys": keys} | {name: x.to(server.device) for name, x in batch.items()}

    def convolve(self, keys: Tensor, **batch: Tensor) -> Tensor:
        new = NewTokens(**batch, page_size=self.server.page_size, reach=self.weight.shape[1] - 1)
        wide = keys.new_full(
            (len(keys) + 3, 3 * keys.shape[1]), 7.0
        )  # queries, keys, values, and what fills a batch up
        wide[: len(keys), keys.shape[1] : 2 * keys.shape[1]] = keys
        self.operation(wide[: len(keys)].chunk(3, 1)[1], self.weight, self.raw_keys, new)
        return wide[: len(keys)].chunk(3, 1)[1]

    def end(self, request: int) -> None:
        """Give back the pages that no other request has."""
        server = self.server
        pages, server.tables[request] = server.tables[request], []
        server.free += [page for page in pages if not any(page in table for table in server.tables)]

    def whole(self, request: int, new: int) -> Tensor:
        return key_convolution(self.server.keys[request].flatten(1)[None], self.weight)[0, -new:]
