// The ink of the charts: colours, hatches, marks, and numbers as words.
const chartInk = (() => {
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], [1, 2], [12, 3]];
  const NUM_COLOURS = 7;
  let inks = document.documentElement;  // whose CSS variables the charts are drawn with

  const ink = name => getComputedStyle(inks).getPropertyValue(name).trim();
  const colourOf = style => ink('--c' + style % NUM_COLOURS);
  const dashOf = style => DASHES[(style + Math.floor(style / NUM_COLOURS)) % DASHES.length];

  /** A number with four significant digits and a real minus. */
  function shown(value) {
    if (value === null || value === undefined) return '\u2013';
    const size = Math.abs(value);
    const plain = size === 0 || (size >= 1e-3 && size < 1e6);
    const words = plain ? String(Number(value.toPrecision(4))) : value.toExponential(2);
    return words.replace(/\.?0+e/, 'e').replaceAll('-', '\u2212').replace('e+', 'e');
  }

  /** Labels of an axis: thousands as k, millions as M, small numbers with an exponent. */
  function axisLabels(values) {
    const known = values.filter(value => value !== null);
    const top = Math.max(...known.map(Math.abs), 0);
    if (known.length > 1 && top < 1e4 && top >= 1e-2) {
      const step = Math.min(...known.slice(1).map((value, i) => value - known[i]));
      const places = Math.min(6, Math.max(0, -Math.floor(Math.log10(step) + 1e-6)));
      return values.map(value => value === null ? ''
        : (Math.abs(value) < step * 1e-6 ? '0' : value.toFixed(places).replace('-', '\u2212')));
    }
    return values.map(value => {
      if (value === null) return '';
      if (Math.abs(value) >= 1e6) return shown(value / 1e6) + 'M';
      if (Math.abs(value) >= 1e4) return shown(value / 1e3) + 'k';
      return shown(Number(value.toPrecision(6)));
    });
  }

  /** Labels of a logarithmic axis: powers of ten, and their neighbours where there are few. */
  function logLabels(plot, values) {
    const few = values.filter(value => value !== null).length <= 12;
    return values.map(value => {
      if (value === null) return '';
      const power = Math.log10(value), isPower = Math.abs(power - Math.round(power)) < 1e-6;
      const first = Number(value.toExponential()[0]);
      return isPower || (few && (first === 2 || first === 5)) ? axisLabels([value])[0] : '';
    });
  }

  /** A pattern of lines in a colour, for areas that differ without it. */
  function hatched(style) {
    const tile = document.createElement('canvas'), side = 8 * devicePixelRatio;
    tile.width = tile.height = side;
    const pen = tile.getContext('2d');
    pen.fillStyle = colourOf(style);
    pen.fillRect(0, 0, side, side);
    pen.strokeStyle = ink('--bg');
    pen.lineWidth = 1.4 * devicePixelRatio;
    pen.beginPath();
    const kind = style % NUM_COLOURS;
    for (const shift of [-side, 0, side]) {
      if (kind === 1 || kind === 4) { pen.moveTo(shift, side); pen.lineTo(shift + side, 0); }
      if (kind === 3 || kind === 4) { pen.moveTo(shift, 0); pen.lineTo(shift + side, side); }
    }
    if (kind === 2 || kind === 6) { pen.moveTo(0, side / 2); pen.lineTo(side, side / 2); }
    if (kind === 5 || kind === 6) { pen.moveTo(side / 2, 0); pen.lineTo(side / 2, side); }
    pen.stroke();
    return pen.createPattern(tile, 'repeat');
  }

  const SHAPES = [
    (pen, x, y, r) => pen.arc(x, y, r, 0, 7),
    (pen, x, y, r) => pen.rect(x - r, y - r, 2 * r, 2 * r),
    (pen, x, y, r) => polygon(pen, [[x, y - 1.3 * r], [x + 1.2 * r, y + r], [x - 1.2 * r, y + r]]),
    (pen, x, y, r) => polygon(pen, [[x, y - 1.4 * r], [x + 1.4 * r, y], [x, y + 1.4 * r],
      [x - 1.4 * r, y]]),
    (pen, x, y, r) => polygon(pen, [[x, y + 1.3 * r], [x + 1.2 * r, y - r], [x - 1.2 * r, y - r]]),
  ];

  function polygon(pen, points) {
    points.forEach(([x, y], i) => i ? pen.lineTo(x, y) : pen.moveTo(x, y));
    pen.closePath();
  }

  /** Everything that uPlot does not draw: reference lines, intervals, marks, rings, spikes. */
  function decorate(chart, plot) {
    const pen = plot.ctx, ratio = devicePixelRatio, {left, top, width, height} = plot.bbox;
    const at = (x, y) => [plot.valToPos(x, 'x', true), plot.valToPos(y, 'y', true)];
    const isShown = (x, y) => x >= plot.scales.x.min && x <= plot.scales.x.max
      && y >= plot.scales.y.min && y <= plot.scales.y.max;
    pen.save();
    pen.setLineDash([]);
    pen.font = 12 * ratio + 'px system-ui,sans-serif';
    for (const line of chart.content.references || []) {
      if (chart.isLog && line.y <= 0) continue;
      const y = plot.valToPos(line.y, 'y', true);
      pen.strokeStyle = ink('--rule');
      pen.lineWidth = ratio;
      pen.setLineDash([5 * ratio, 4 * ratio]);
      pen.beginPath();
      pen.moveTo(left, y);
      pen.lineTo(left + width, y);
      pen.stroke();
      pen.setLineDash([]);
      pen.textAlign = 'right';
      pen.lineWidth = 3 * ratio;
      pen.strokeStyle = ink('--bg');
      pen.strokeText(line.label, left + width - 3 * ratio, y - 4 * ratio);
      pen.fillStyle = ink('--muted');
      pen.fillText(line.label, left + width - 3 * ratio, y - 4 * ratio);
    }
    for (const curve of chart.content.curves) {
      pen.strokeStyle = pen.fillStyle = colourOf(curve.style);
      marks(curve, pen, at, isShown, ratio, chart.isLog);
      const values = curve.high || curve.mean;
      let peak = -1;
      values.forEach((y, i) => {
        const isSpike = y !== null && y > plot.scales.y.max && curve.x[i] >= plot.scales.x.min
          && curve.x[i] <= plot.scales.x.max;
        if (isSpike && (peak < 0 || y > values[peak])) peak = i;
      });
      if (peak >= 0) {
        const x = plot.valToPos(curve.x[peak], 'x', true), r = 4 * ratio;
        pen.beginPath();
        polygon(pen, [[x - r, top + 7 * ratio], [x + r, top + 7 * ratio], [x, top]]);
        pen.fill();
        const words = shown(values[peak]);
        pen.textAlign = x > left + width / 2 ? 'right' : 'left';
        pen.fillText(words, x + (x > left + width / 2 ? -2 : 2) * r, top + 8 * ratio);
      }
      if (curve.broken !== undefined && curve.broken >= plot.scales.x.min) {
        const x = plot.valToPos(curve.broken, 'x', true), r = 4 * ratio, y = top + height - 2 * r;
        pen.strokeStyle = ink('--bad');
        pen.lineWidth = 2 * ratio;
        pen.beginPath();
        pen.moveTo(x - r, y - r); pen.lineTo(x + r, y + r);
        pen.moveTo(x + r, y - r); pen.lineTo(x - r, y + r);
        pen.stroke();
      }
    }
    pen.restore();
  }

  /** Points with their intervals, and the ring of the best one; single points of other curves. */
  function marks(curve, pen, at, isShown, ratio, isLog) {
    const shape = SHAPES[curve.style % SHAPES.length];
    if (!curve.intervals && curve.x.length > 1) return;
    curve.x.forEach((x, i) => {
      const y = curve.mean[i];
      if (y === null || !isShown(x, y)) return;
      const ends = curve.intervals ? curve.intervals[i] : [null, null];
      const [px, py] = at(x, y);
      if (ends[0] !== null && ends[1] !== null && (!isLog || ends[0] > 0)) {
        pen.globalAlpha = .5;
        pen.lineWidth = 1.5 * ratio;
        pen.beginPath();
        pen.moveTo(...at(x, ends[0]));
        pen.lineTo(...at(x, ends[1]));
        pen.stroke();
        pen.globalAlpha = 1;
      }
      pen.beginPath();
      shape(pen, px, py, 3 * ratio);
      pen.fill();
      if (x === curve.ring) {
        pen.lineWidth = 2 * ratio;
        pen.beginPath();
        pen.arc(px, py, 7 * ratio, 0, 7);
        pen.stroke();
      }
    });
  }

  /** Take the colours from the CSS variables of an element. */
  function takeFrom(element) { inks = element; }

  return {ink, colourOf, dashOf, shown, axisLabels, logLabels, hatched, decorate, takeFrom};
})();
