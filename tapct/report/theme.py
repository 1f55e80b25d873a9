"""Looks and behaviour of the page: one style sheet, one small script. No fonts, files or requests
from outside.

Colours are Okabe and Ito's, which stay apart for colour-blind readers, a little darker on white and
lighter on black.
"""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--muted:#5b6570;--line:#dfe3e8;--soft:#f5f7f9;--rule:#7a8490;
--c0:#0072b2;--c1:#d55e00;--c2:#00855f;--c3:#b0578d;--c4:#b37a00;--c5:#2f95c9;--c6:#6b6b6b;
--good:#00714f;--warn:#8a5a00;--bad:#b3261e;--good-bg:#e5f5ef;--warn-bg:#fdf3dd;--bad-bg:#fdeae8;--band:#0072b21c;
--bar:#0072b233}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ed;--muted:#9aa5b1;--line:#2d333b;
--soft:#1c2127;--rule:#8b95a1;
--c0:#5cb3e8;--c1:#f08a4b;--c2:#3cc49a;--c3:#dd93bf;--c4:#eab54a;--c5:#9ad4f5;--c6:#a8a8a8;
--good:#5fd6ae;--warn:#eab54a;--bad:#ff8f85;--good-bg:#12302a;--warn-bg:#33290f;--bad-bg:#3a1b19;--band:#5cb3e826;
--bar:#5cb3e840}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1520px;margin:0 auto;padding:0 clamp(14px,2.5vw,40px) 60px}
h1{font-size:clamp(22px,3vw,32px);line-height:1.2;margin:28px 0 2px;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 4px;padding-top:10px;border-top:2px solid var(--line)}
h3{font-size:15px;margin:22px 0 6px}
p{margin:4px 0 10px;max-width:85ch}
.muted,.unit{color:var(--muted)}
code{font:.92em ui-monospace,"DejaVu Sans Mono",Menlo,monospace;background:var(--soft);padding:.1em .35em;
border-radius:4px;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 0;font-size:14px}
a{color:var(--c0);text-decoration:none}a:hover{text-decoration:underline}
.verdict{margin:18px 0;padding:12px 16px;border-radius:8px;border-left:6px solid var(--muted);background:var(--soft)}
.verdict p{margin:2px 0}
.verdict strong{font-size:18px}
.verdict.good{border-color:var(--good);background:var(--good-bg)}.verdict.good strong{color:var(--good)}
.verdict.warn{border-color:var(--warn);background:var(--warn-bg)}.verdict.warn strong{color:var(--warn)}
.verdict.bad{border-color:var(--bad);background:var(--bad-bg)}.verdict.bad strong{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr));gap:10px;margin:16px 0}
.tile{border:1px solid var(--line);border-radius:8px;padding:9px 12px;break-inside:avoid}
.tile dt{color:var(--muted);font-size:13px}
.tile dd{margin:0;font-size:21px;font-variant-numeric:tabular-nums;line-height:1.3}
.tile dd small{display:block;font-size:12.5px;color:var(--muted)}
.grid{stroke:var(--line)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:22px 26px;margin:14px 0}
figure{margin:0;min-width:0;break-inside:avoid}
.chart figcaption{font-size:15px}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;font-size:13px;color:var(--muted);min-height:1.5em;
font-variant-numeric:tabular-nums;position:relative}
.legend .val{color:var(--fg);font-weight:600}.legend .at{position:absolute;right:2px;top:-1.6em}
.broken-note{color:var(--bad)}
.key{width:22px;height:10px;margin-right:5px}
svg.plot{display:block;overflow:visible;width:100%;height:auto;touch-action:pan-y;font-size:12.5px}
svg path{fill:none;vector-effect:non-scaling-stroke}
.axis{stroke:var(--rule)}.tick{fill:var(--muted)}
.line{stroke-width:2;stroke-linejoin:round}.raw{stroke-width:1;opacity:.3}
.rule{stroke:var(--rule);stroke-dasharray:5 4}
.rule-label{fill:var(--muted);font-size:12px;paint-order:stroke;stroke:var(--bg);stroke-width:3px}
svg path.band{fill:var(--band)}svg path.area{opacity:.85}.cursor{stroke:var(--muted);stroke-width:1}
.broken{stroke:var(--bad);stroke-width:2}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:500}thead th{color:var(--muted);font-size:13px;vertical-align:bottom}
td.n,th.n{text-align:right}
table.facts td{overflow-wrap:anywhere}
table.facts th{color:var(--muted);white-space:nowrap}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:4px 48px;align-items:start}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:7px}
.share{display:flex;height:18px;border-radius:4px;overflow:hidden;margin:8px 0;max-width:720px}
.share span{border-right:1px solid var(--bg)}
.models{width:100%;max-width:960px}.models td.track{width:60%;min-width:130px;padding-top:7px}
.track div{position:relative;height:16px;background:var(--soft);border-radius:3px}
.track span{position:absolute;inset:0 auto 0 0;border-radius:3px 0 0 3px;background:var(--muted);opacity:.45}
tr.first .track span{background:var(--c0);opacity:.6}tr.first th,tr.first td.n{font-weight:700}
.track i{position:absolute;top:3px;width:2px;height:10px;background:var(--fg);opacity:.55}
.organs td{min-width:84px;padding:3px 8px;border-left:3px solid var(--bg);
background:linear-gradient(90deg,var(--bar) var(--v,0%),transparent var(--v,0%))}
.organs th{white-space:nowrap}.organs .best{font-weight:700}
.organs thead th{padding-left:8px;white-space:normal;min-width:84px}.organs thead th:first-child{padding-left:0}
.compare th.n{vertical-align:bottom;overflow-wrap:anywhere;min-width:90px}.compare td.n{overflow-wrap:anywhere}
.compare tbody th{white-space:nowrap}.compare .between{padding-top:16px;color:var(--muted);font-size:13px}
.overlaid .raw{opacity:.16}
ul.missing{padding-left:30px}
.up{color:var(--good)}.down{color:var(--bad)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:18px;margin:12px 0}
.pictures img{width:100%;height:auto;border-radius:6px;background:#000;cursor:zoom-in;display:block}
.pictures figure.wide{grid-column:1/-1}.pictures figure.wide img{cursor:zoom-out}
.pictures figcaption{font-size:13px;color:var(--muted);margin-top:4px;overflow-wrap:anywhere}
details{margin:8px 0}summary{cursor:pointer;color:var(--c0)}
pre{font:13px/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,monospace;background:var(--soft);padding:12px 14px;
border-radius:8px;overflow-x:auto}
.missing{border:1px dashed var(--line);border-radius:8px;padding:10px 14px;color:var(--muted);max-width:85ch}
footer{margin-top:40px;color:var(--muted);font-size:13px;border-top:1px solid var(--line);padding-top:8px}
@media (max-width:520px){table.facts,table.facts tbody,table.facts tr{display:block}
table.facts th,table.facts td{display:block;border:0;padding:0}
table.facts tr{padding:5px 0;border-bottom:1px solid var(--line)}}
@media print{body{font-size:10.5pt}main{max-width:none;padding:0}nav{display:none}
.charts{grid-template-columns:1fr 1fr;gap:14px 20px}.pictures{grid-template-columns:1fr 1fr}
h2{break-after:avoid}pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:8.5pt}.scroll{overflow:visible}
tr{break-inside:avoid}
.verdict,.tile,.track div,.track span,.share span,.swatch,.organs td{print-color-adjust:exact;
-webkit-print-color-adjust:exact}a{color:inherit}}
"""

JS = """
for (const figure of document.querySelectorAll('figure.chart')) {
  const svg = figure.querySelector('svg.plot'), cursor = svg.querySelector('.cursor');
  const {frame: [x0, x1, left, right, width], series} = JSON.parse(figure.querySelector('script').textContent);
  const values = [...figure.querySelectorAll('.val')], last = values.map(v => v.textContent);
  const at = figure.querySelector('.at');
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
    return x - xs[low] < xs[high] - x ? low : high;
  };
  const ends = one => one.x[one.x.length - 1], longest = series.reduce((a, b) => ends(b) > ends(a) ? b : a);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), unit = (event.clientX - box.left) / box.width * width;
    const x = Math.min(x1, Math.max(x0, x0 + (unit - left) / (right - left) * (x1 - x0)));
    const step = longest.x[nearest(longest.x, x)], shown = left + (step - x0) / (x1 - x0) * (right - left);
    cursor.setAttribute('transform', `translate(${shown} 0)`);
    cursor.setAttribute('visibility', 'visible');
    at.textContent = 'at ' + Math.round(step).toLocaleString('en');
    series.forEach((one, i) => {
      const y = one.y[nearest(one.x, step)], ended = step > ends(one) + (x1 - x0) / 100;
      values[i].textContent = ended ? '\\u2013' : y === null ? 'not finite' :
        Number(y.toPrecision(4)).toString().replace('-', '\\u2212');
    });
  });
  svg.addEventListener('pointerleave', () => {
    cursor.setAttribute('visibility', 'hidden');
    at.textContent = '';
    values.forEach((v, i) => { v.textContent = last[i]; });
  });
}
for (const image of document.querySelectorAll('.pictures img'))
  image.addEventListener('click', () => image.closest('figure').classList.toggle('wide'));
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
"""
