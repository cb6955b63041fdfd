"""The style sheet of the report."""

STYLE = """
:root { --ink: #0f172a; --muted: #64748b; --line: #e2e8f0; --paper: #fff; --ground: #f8fafc;
  --tint: #dbeafe; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 1.75rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.25rem); line-height: 1.15; letter-spacing: -.02em;
  margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 0 0 1rem; }
h3 { font-size: 1rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
header p, section > p { color: var(--muted); margin: 0 0 1rem; overflow-wrap: anywhere; }
small { color: var(--muted); font-size: .82em; font-weight: 400; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
  padding: 1.5rem; margin: 0 0 1.25rem; }
.keys { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; margin: 0; padding: 0;
  font-size: .95rem; }
i { display: inline-block; width: .75em; height: .75em; border-radius: 3px; margin-right: .5em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1.25rem;
  background: none; border: 0; padding: 0; }
.tile { background: var(--paper); border: 1px solid var(--line); border-top: 4px solid var(--run);
  border-radius: 14px; padding: 1.1rem 1.4rem; }
.tile h2 { margin: 0 0 .5rem; overflow-wrap: anywhere; }
.tile p { margin: 0; color: var(--muted); font-size: .9rem; }
.tile .number { display: inline-block; margin: 0 1.3rem .6rem 0; color: var(--ink);
  font-size: 1.7rem; font-weight: 650; line-height: 1.2; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.number small { display: block; font-size: .8rem; letter-spacing: 0; }
.scroll { overflow-x: auto; margin: 0 -.25rem; padding: 0 .25rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 500; font-size: .85rem; }
thead th[colspan] { text-align: center; }
tbody th, thead tr:first-child th:first-child { text-align: left; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
tbody tr:last-child > * { border-bottom: 0; }
tr.muted, tr.muted th { color: var(--muted); font-weight: 400; }
td.bar { min-width: 6rem; background: linear-gradient(90deg, var(--tint) var(--share),
  transparent 0) no-repeat .35rem 50% / calc(100% - .7rem) 72%; }
td.remark { text-align: left; color: var(--muted); white-space: normal; font-size: .85rem; }
table.facts td, table.facts thead th { text-align: left; white-space: normal; min-width: 9rem; }
table.facts tbody th { color: var(--muted); font-weight: 500; }
p.facts { display: flex; flex-wrap: wrap; gap: .1rem .9rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.scroll + .figures { margin-top: 1.75rem; }
figure { margin: 0; flex: 1 1 18rem; max-width: 27rem; }
.notes { flex: 1 1 18rem; margin: 0; padding-left: 1.1rem; color: var(--muted); font-size: .85rem; }
.notes li { margin-bottom: .35rem; }
.scroll + .figures figure { flex-grow: 1.6; max-width: 38rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: var(--muted); text-align: center; margin-top: .3rem; }
article { border-top: 1px solid var(--line); padding: 1.1rem 0 .6rem; }
.grid { display: grid; gap: .5rem; align-items: center; font-size: .85rem;
  grid-template-columns: 5.2rem repeat(var(--columns), minmax(6.5rem, 16rem)); }
.grid span { overflow-wrap: anywhere; line-height: 1.25; }
.grid span small { display: block; }
.grid img { width: 100%; display: block; border-radius: 8px; background: #000; }
.pill { display: inline-block; padding: .05rem .6rem; margin-right: .6rem; border-radius: 999px;
  font-size: .78rem; font-weight: 600; background: #e2e8f0; color: #334155; }
.pill.best { background: #d1fae5; color: #065f46; }
.pill.worst { background: #ffe4e6; color: #9f1239; }
details { border-top: 1px solid var(--line); padding: .6rem 0; }
details:first-of-type { border-top: 0; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.5rem .75rem 3rem; }
  section { padding: 1.1rem .9rem; border-radius: 12px; }
  .tiles { padding: 0; gap: .75rem; }
  th, td { padding: .45rem .55rem; }
  .grid { grid-template-columns: repeat(var(--columns), minmax(4.4rem, 1fr)); gap: .3rem; }
  .grid .plane { grid-column: 1 / -1; margin-top: .3rem; color: var(--muted); }
  .grid .plane:first-child { display: none; }
  .grid .plane small { display: inline; }
}
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
