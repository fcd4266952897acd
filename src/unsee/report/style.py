"""The page's style sheet: two palettes, no fonts or pictures from elsewhere."""

from __future__ import annotations

STYLE = """
:root {
  --ground: #f7f6f3; --card: #ffffff; --ink: #1d2327; --soft: #5d676f; --line: #e3e1db;
  --up: #0f6b70; --down: #a3472b; --bar: #b9c3c7; --floor: #f0e3bd; --tint: #eaf2f1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181b; --card: #1d2327; --ink: #e8eaeb; --soft: #9da8b0; --line: #323a40;
    --up: #63c5c4; --down: #eb9376; --bar: #5a666d; --floor: #4a4225; --tint: #1b2b2d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1, h2, h3, p, ol, ul, dl, figure { margin: 0; padding: 0; }
ol, ul { list-style: none; }
img { display: block; max-width: 100%; }
a { color: inherit; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; max-width: 30em; }
h2 { font-size: 26px; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h3 { font-size: 19px; margin-top: 36px; }
.brand, .eyebrow {
  color: var(--up); font-size: 13px; font-weight: 600; letter-spacing: 0.08em;
}
.brand { font-size: 15px; letter-spacing: 0.02em; margin-bottom: 6px; }
.eyebrow { text-transform: uppercase; }
.lead { margin-top: 10px; color: var(--soft); font-size: 17px; }
.lead strong { color: var(--ink); }
.reading {
  margin-top: 20px; padding: 14px 18px; background: var(--tint); border-left: 3px solid var(--up);
  border-radius: 0 8px 8px 0; max-width: 62em;
}
.notes { margin-top: 14px; display: grid; gap: 6px; }
.notes li, .warning {
  padding: 8px 14px; border-radius: 8px; background: var(--floor); overflow-wrap: anywhere;
}
.up { color: var(--up); } .down { color: var(--down); }
nav ol { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; }
nav a {
  display: flex; align-items: center; gap: 12px; padding: 8px 16px 8px 8px; max-width: 340px;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  text-decoration: none; line-height: 1.3;
}
nav a:hover, nav a:focus-visible { border-color: var(--up); }
nav img { width: 48px; height: 48px; object-fit: contain; border-radius: 6px; background: #fff; }
.query { margin-top: 56px; padding-top: 40px; border-top: 1px solid var(--line); }
header + .query { margin-top: 36px; }
.hero { display: grid; grid-template-columns: 360px minmax(0, 1fr); gap: 36px; align-items: start; }
.hero.bare { grid-template-columns: minmax(0, 1fr); }
.frame {
  position: relative; overflow: hidden; border-radius: 12px; background: #fff;
  box-shadow: 0 0 0 1px var(--line), 0 6px 24px rgb(0 0 0 / 0.07);
}
.frame img { width: 100%; height: auto; }
.overlay { position: absolute; inset: 0; width: 100%; height: 100%; }
.overlay * { vector-effect: non-scaling-stroke; fill: none; }
.overlay .outside { fill: #101518; fill-opacity: 0.42; }
.overlay .cells { stroke: #101518; stroke-opacity: 0.28; stroke-width: 1px; }
.overlay .halo { stroke: #fff; stroke-width: 5px; }
.overlay .box { stroke: #c2371d; stroke-width: 2.5px; }
figcaption { margin-top: 10px; color: var(--soft); font-size: 14px; line-height: 1.4; }
.facts { display: flex; flex-wrap: wrap; margin-top: 8px; color: var(--soft); font-size: 15px; }
.facts li { overflow-wrap: anywhere; }
.facts li:not(:last-child)::after { content: "·"; margin: 0 8px; }
.fact { margin-top: 12px; }
.distribution { margin-top: 22px; }
.histogram { display: block; overflow: visible; }
.histogram text { fill: var(--soft); font-size: 12px; }
.histogram .count { font-size: 11px; }
.histogram .grid { fill: var(--line); }
.histogram .axis, .histogram .zero { fill: var(--soft); }
.histogram .zero { opacity: 0.6; }
.bar { fill: var(--bar); background: var(--bar); }
.most { fill: var(--up); background: var(--up); }
.least { fill: var(--down); background: var(--down); }
.floor { fill: var(--floor); background: var(--floor); }
.distribution figcaption { margin: 0; text-align: center; font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 8px; font-size: 13px; }
.legend li { display: flex; align-items: center; gap: 7px; color: var(--soft); }
.legend i { width: 12px; height: 12px; border-radius: 3px; }
.hint { margin-top: 4px; color: var(--soft); font-size: 15px; }
.warning { margin-top: 8px; }
.cards {
  display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 16px; margin-top: 16px;
}
.cards > li {
  padding: 12px; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  min-width: 0; display: flex; flex-direction: column;
}
.thumb {
  display: grid; place-items: center; aspect-ratio: 1; background: #fff; border-radius: 8px;
  overflow: hidden;
}
.cards .thumb { padding: 8px; }
.thumb img { width: 100%; height: 100%; object-fit: contain; }
.pixelated { image-rendering: pixelated; }
.noise .thumb { opacity: 0.55; }
.score {
  display: flex; justify-content: space-between; align-items: baseline; gap: 8px;
  margin-top: 10px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.rank { color: var(--soft); font-weight: 600; font-size: 14px; }
.share { height: 3px; margin-top: 6px; background: var(--line); border-radius: 2px; }
.share i { display: block; height: 100%; background: var(--up); border-radius: 2px; }
.caption { margin-top: 8px; line-height: 1.35; overflow-wrap: anywhere; }
.cards .caption, .strip .caption {
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; line-clamp: 3;
  overflow: hidden;
}
.more { color: var(--soft); font-size: 13px; }
.tag {
  align-self: start; margin-top: 6px; padding: 1px 8px; border-radius: 10px;
  background: var(--floor); font-size: 12px;
}
.cards details { margin-top: auto; padding-top: 8px; font-size: 13px; color: var(--soft); }
.cards summary {
  cursor: pointer; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
}
.cards summary::marker { color: var(--bar); }
.cards summary span + span::before { content: " · "; }
.id { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12px; }
.cards dl { margin-top: 6px; }
.cards dt { font-size: 11px; margin-top: 4px; }
.cards dd { margin: 0; color: var(--ink); line-height: 1.35; overflow-wrap: anywhere; }
.strip {
  display: grid; grid-template-columns: repeat(10, minmax(0, 1fr)); gap: 12px; margin-top: 14px;
}
.strip li { font-size: 13px; min-width: 0; }
.strip .thumb { border: 1px solid var(--line); padding: 4px; }
.strip .score { margin-top: 6px; font-size: 13px; letter-spacing: -0.02em; }
.strip .caption { margin-top: 2px; line-height: 1.3; -webkit-line-clamp: 2; line-clamp: 2; }
.strip .rank { font-size: 12px; font-weight: 400; }
.settings { margin-top: 32px; border-top: 1px solid var(--line); }
.settings > summary { padding: 12px 0; cursor: pointer; color: var(--soft); font-weight: 600; }
.settings > summary:hover { color: var(--ink); }
table { width: 100%; border-collapse: collapse; font-size: 14px; margin-bottom: 16px; }
th, td { padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); text-align: start; }
th { width: 12em; font-weight: 400; color: var(--soft); vertical-align: top; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.times td:nth-child(2) { white-space: nowrap; width: 8em; }
.times .share { margin: 0; height: 6px; background: none; }
.times .total > * { border: 0; font-weight: 600; color: var(--ink); }
.names { margin-bottom: 16px; font-size: 14px; color: var(--soft); }
.names summary { cursor: pointer; }
.names li { font: 12px/1.6 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.run { margin-top: 56px; padding-top: 32px; border-top: 1px solid var(--line); }
.run h2 { font-size: 19px; margin-bottom: 8px; letter-spacing: 0; }
@media (max-width: 900px) {
  .hero { grid-template-columns: minmax(0, 1fr); gap: 24px; }
  .picture { max-width: 420px; }
  .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .strip { grid-template-columns: repeat(5, minmax(0, 1fr)); }
}
@media (max-width: 560px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 26px; }
  h2 { font-size: 22px; }
  .picture { max-width: none; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
  .strip { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .query { margin-top: 40px; padding-top: 28px; }
  th { width: 8.5em; }
  .times .wide { display: none; }
}
@media print {
  .cards > li, .hero { break-inside: avoid; }
}
"""
