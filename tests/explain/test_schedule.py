"""Launches and their counts with loops, branches, calls and asynchronous pairs."""

from collections import Counter

from flax_fp8.explain import hlo, schedule

TEXT = """HloModule m

%double (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %twice = f32[4]{0} add(%p, %p)
}

%inner_body (c: (f32[4], s32[])) -> (f32[4], s32[]) {
  %c = (f32[4]{0}, s32[]) parameter(0)
  %v = f32[4]{0} get-tuple-element(%c), index=0
  %i = s32[] get-tuple-element(%c), index=1
  %deep = f32[4]{0} fusion(%v), kind=kLoop, calls=%double
  ROOT %carry = (f32[4]{0}, s32[]) tuple(%deep, %i)
}

%never (q: (f32[4], s32[])) -> pred[] {
  %q = (f32[4]{0}, s32[]) parameter(0)
  ROOT %test = pred[] constant(false)
}

%outer_body (c2: (f32[4], s32[])) -> (f32[4], s32[]) {
  %c2 = (f32[4]{0}, s32[]) parameter(0)
  ROOT %nested = (f32[4]{0}, s32[]) while(%c2), condition=%never, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"}}
}

%called (r: f32[4]) -> f32[4] {
  %r = f32[4]{0} parameter(0)
  ROOT %shallow = f32[4]{0} negate(%r)
}

%left (l: f32[4]) -> f32[4] {
  %l = f32[4]{0} parameter(0)
  ROOT %left_op = f32[4]{0} abs(%l)
}

%right (s: f32[4]) -> f32[4] {
  ROOT %s = f32[4]{0} parameter(0)
}

%scattered (u: f32[4]) -> f32[2] {
  %u = f32[4]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%u), dimensions={0}, to_apply=%double
}

ENTRY %main (x: f32[4], n: s32[], which: s32[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %n = s32[] parameter(1)
  %which = s32[] parameter(2)
  %start = (f32[4]{0}, s32[]) tuple(%x, %n)
  %known = (f32[4]{0}, s32[]) while(%start), condition=%never, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (f32[4]{0}, s32[]) while(%known), condition=%never, body=%inner_body
  %y = f32[4]{0} get-tuple-element(%unknown), index=0
  %z = f32[4]{0} call(%y), to_apply=%called
  %w = f32[4]{0} conditional(%which, %z, %z), branch_computations={%left, %right}
  %async = ((f32[4]{0}), f32[2]{0}) reduce-scatter-start(%w), calls=%scattered
  %done = f32[2]{0} reduce-scatter-done(%async)
  %new = f32[4]{0} from-the-future(%w)
  ROOT %end = f32[4]{0} copy(%new)
}
"""


def test_counts():
  launched = schedule.launches(hlo.parse(TEXT))
  counts = Counter()
  for launch in launched:
    counts[launch.instruction.name] += launch.times
  assert counts == {
    "deep": 5 * 3 + 1,
    "shallow": 1,
    "left_op": 1,
    "rs": 1,
    "new": 1,
    "end": 1,
  }


def test_doubts():
  launched = schedule.launches(hlo.parse(TEXT))
  doubts = {(launch.instruction.name, launch.doubt) for launch in launched if launch.doubt}
  assert doubts == {
    ("deep", "loop of unknown length, counted once"),
    ("left_op", "branch, counted as taken"),
  }


def test_iterations_of_the_innermost_loop():
  launched = schedule.launches(hlo.parse(TEXT))
  trips = [(launch.instruction.name, launch.trips) for launch in launched]
  assert trips[:3] == [("deep", 3), ("deep", 1), ("shallow", 1)]
