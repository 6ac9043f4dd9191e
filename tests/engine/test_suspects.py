"""`suspects.py`: a request that kills engines is found out, and costs its neighbours little."""

from __future__ import annotations

from dataclasses import replace

from textgen_engine.request import GenerationRequest
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.suspects import Standing, Suspects

from .tiny import make_request


def _request(index: int) -> GenerationRequest:
    return make_request(f"r{index}", [5, 6, index], 8)


def test_the_guilty_one_is_refused_and_its_neighbours_are_cleared() -> None:
    suspects = Suspects()
    batch = [_request(index) for index in range(4)]
    assert {suspects.standing(request, 0.0) for request in batch} == {Standing.CLEAR}
    suspects.note_death(batch, 1.0)
    assert {suspects.standing(request, 1.0) for request in batch} == {Standing.CLEAR}
    suspects.note_death(batch, 2.0)
    assert {suspects.standing(request, 2.0) for request in batch} == {Standing.QUARANTINED}
    suspects.clear(batch[1])
    suspects.note_death([batch[0]], 3.0)
    assert [suspects.standing(request, 3.0) for request in batch] == [
        Standing.REFUSED,
        Standing.CLEAR,
        Standing.QUARANTINED,
        Standing.QUARANTINED,
    ]
    assert suspects.standing(_request(9), 3.0) is Standing.CLEAR


def test_what_differs_from_try_to_try_does_not_matter() -> None:
    suspects = Suspects()
    request = replace(_request(0), sampling=SamplingParams(do_sample=True, seed=1))
    again = replace(
        request, request_id="again", arrival_s=9.0, deadline_s=99.0, sampling=SamplingParams(do_sample=True, seed=2)
    )
    for death in range(3):
        suspects.note_death([request, again], float(death))
    assert suspects.standing(again, 3.0) is Standing.REFUSED
    other = replace(request, sampling=SamplingParams(do_sample=True, seed=1, top_k=3))
    assert suspects.standing(other, 3.0) is Standing.CLEAR


def test_it_is_forgotten() -> None:
    suspects = Suspects()
    for death in range(3):
        suspects.note_death([_request(0)], float(death))
    assert suspects.standing(_request(0), 2.0 + suspects.memory_s - 1) is Standing.REFUSED
    assert suspects.standing(_request(0), 2.0 + suspects.memory_s) is Standing.CLEAR
    suspects.note_death([_request(1)], 2.0 + suspects.memory_s)
    assert suspects.standing(_request(0), 2.0) is Standing.CLEAR, "the books do not grow"
