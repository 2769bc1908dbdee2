"""The style sheet of report.html, and the page's own security policy."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

CSS = """
:root {
  --page: #ffffff; --panel: #f5f7f9; --ink: #1b1f25; --muted: #5f6975; --grid: #e2e5e9; --ours: #1d5fd1;
  --published-0: #b8500f; --published-1: #23824f; --published-2: #7a48c4; --published-3: #a3296f;
  --published-4: #0f7f8c;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light dark;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1c2026; --ink: #e6e9ed; --muted: #9aa4b0; --grid: #2e343c; --ours: #7aabff;
    --published-0: #f0955a; --published-1: #61c48d; --published-2: #b99af0; --published-3: #ec84bb;
    --published-4: #55c3d0;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--grid); }
h3 { font-size: .95rem; margin: 1.25rem 0 .35rem; }
p, ul { max-width: 46rem; }
.subtitle { color: var(--muted); margin: 0 0 1.5rem; font-size: .9rem; }
.lead { font-size: 1.08rem; }
code, pre { font-family: var(--mono); font-size: .86em; }
code { overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.6rem, 1fr)); gap: .75rem; margin: 0 0 1.5rem; }
.tile { background: var(--panel); border-radius: .6rem; padding: .8rem .95rem; }
.tile dt { color: var(--muted); font-size: .82rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.3rem; font-weight: 650; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile .beside { color: var(--muted); font-size: .8rem; line-height: 1.35; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.75rem 2rem; }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption { color: var(--muted); font-size: .84rem; line-height: 1.45; margin-top: .4rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; min-width: 60%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: .82rem; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 8rem; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; padding-left: .5rem; }
td.strong { font-weight: 650; white-space: nowrap; }
tbody th code { white-space: nowrap; }
pre {
  background: var(--panel); border-radius: .6rem; padding: .85rem 1rem; margin: .5rem 0; line-height: 1.5;
  overflow-x: auto;
}
pre.passage {
  white-space: pre-wrap; overflow-wrap: anywhere; font-family: var(--sans); font-size: .92rem; max-width: 46rem;
  unicode-bidi: isolate;
}
summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
li { margin: .2rem 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .tile { padding: .65rem .75rem; }
  .tile .value { font-size: 1.2rem; }
  td.strong { white-space: normal; }
  .numbers { font-size: .8rem; }
  .numbers tbody th { min-width: 5.5rem; }
  .numbers th, .numbers td { padding-right: .5rem; }
  table:not([class]) td { white-space: nowrap; }
  .stacked thead { display: none; }
  .stacked tr { display: block; border-bottom: 1px solid var(--grid); padding: .4rem 0; }
  .stacked th, .stacked td { display: block; border: 0; padding: 0; overflow-wrap: anywhere; }
  .stacked tbody th { color: var(--muted); font-size: .82rem; }
}
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  tr, .tile, pre.passage { break-inside: avoid; }
  .gallery { grid-template-columns: 1fr 1fr; }
  .tile, pre { border: 1px solid var(--grid); }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
}
"""
