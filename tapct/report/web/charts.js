// Draws the charts with uPlot: smoothing, logarithmic axis, zoom, values under the pointer.
{
  const {ink, colourOf, dashOf, shown, axisLabels, logLabels, hatched, decorate} = chartInk;
  const HEIGHT = 232;
  const FOLLOWED = ['mousemove', 'mouseenter', 'mouseleave'];
  const charts = [];  // every chart of the page, drawn or not
  const windows = new Map();  // name of an x axis -> the part of it that is shown, if not all
  let smoothing = 3;  // % of the points

  /** Mean over up to 2 * half + 1 neighbours without nulls: symmetric at the start, where curves
      are steep, and looking back at the end, where they are noisy. */
  function rollingMean(values, half) {
    const sums = [0], counts = [0];
    values.forEach((value, i) => {
      sums.push(sums[i] + (value === null ? 0 : value));
      counts.push(counts[i] + (value === null ? 0 : 1));
    });
    return values.map((_, i) => {
      const reach = Math.min(i, half), low = i - reach;
      const high = Math.min(i + reach, values.length - 1) + 1;
      const count = counts[high] - counts[low];
      return count ? (sums[high] - sums[low]) / count : null;
    });
  }

  /** The line in front: the curve itself, or its rolling mean. */
  function frontOf(curve) {
    const half = curve.smooth ? Math.floor(curve.mean.length * smoothing / 200) : 0;
    return half ? rollingMean(curve.mean, half) : curve.mean;
  }

  /** Value below which a share of the sorted numbers lies. */
  const quantile = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))];

  /** Axis limits: the lines in front whole, the raw values but for rare spikes. */
  function limits(chart, plot) {
    // the scale of x changes only after the limits of y are known; its indices are already new
    const [from, to] = plot.series[0].idxs, fronts = [], raws = [];
    const min = plot.data[0][from], max = plot.data[0][to];
    for (const series of chart.series) {
      const values = plot.data[series.index];
      for (let i = from; i <= to; i++) {
        const y = values[i];
        if (y === null || y === undefined || (chart.isLog && y <= 0)) continue;
        (series.role === 'front' ? fronts : raws).push(y);
      }
    }
    for (const curve of chart.content.curves)
      (curve.intervals || []).forEach((ends, i) => {
        if (curve.x[i] >= min && curve.x[i] <= max)
          fronts.push(...ends.filter(end => end !== null && (!chart.isLog || end > 0)));
      });
    raws.sort((a, b) => a - b);
    const {references = [], zero} = chart.content;
    const wanted = fronts.concat(raws.length ? [quantile(raws, .005), quantile(raws, .995)] : []);
    for (const line of references) if (!chart.isLog || line.y > 0) wanted.push(line.y);
    if (zero && !chart.isLog) wanted.push(0);
    if (!wanted.length) return chart.isLog ? [.1, 1] : [0, 1];
    let low = wanted.reduce((a, b) => Math.min(a, b));
    let high = wanted.reduce((a, b) => Math.max(a, b));
    if (chart.isLog) return low < high ? [low / 1.15, high * 1.15] : [low / 2, high * 2];
    if (raws.length) {  // spikes that are nearly inside
      const slack = .4 * (high - low), least = raws[0], most = raws[raws.length - 1];
      if (least < low && least >= low - slack) low = least;
      if (most > high && most <= high + slack) high = most;
    }
    const isFlat = high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high));
    const pad = isFlat ? .5 * Math.abs(high) || 1 : .06 * (high - low);
    const nearTop = references.some(line => line.y > high - .05 * (high - low));
    const room = nearTop ? .1 * (high - low) : 0;  // for its label
    return [zero && low >= 0 ? 0 : low - pad, high + Math.max(pad, room)];
  }

  /** Columns of uPlot for lines: range or raw values of all curves, then all lines in front. */
  function lineTables(chart) {
    const tables = [], series = [], fronts = chart.content.curves.map(frontOf);
    const add = (x, values, role, style) => {
      tables.push([x, values]);
      series.push({index: series.length + 1, role, style});
    };
    chart.content.curves.forEach((curve, i) => {
      if (curve.low) {
        add(curve.x, curve.low, 'low', curve.style);
        add(curve.x, curve.high, 'high', curve.style);
      } else if (fronts[i] !== curve.mean) {
        add(curve.x, curve.mean, 'raw', curve.style);
      }
    });
    chart.content.curves.forEach((curve, i) => add(curve.x, fronts[i], 'front', curve.style));
    return [uPlot.join(tables), series];
  }

  /** Columns of uPlot for stacked areas, the highest first: each is drawn over the one before. */
  function areaTables(chart) {
    const {curves} = chart.content, sums = [];
    curves.forEach((curve, i) => {
      sums.push(curve.mean.map((value, k) => value + (i ? sums[i - 1][k] : 0)));
    });
    const order = curves.map((_, i) => curves.length - 1 - i);
    const series = order.map((i, k) => ({index: k + 1, role: 'front', style: curves[i].style}));
    return [[curves[0].x, ...order.map(i => sums[i])], series];
  }

  /** How uPlot draws one column. */
  function seriesOptions({role, style}, isArea, isOverlaid) {
    const stroke = () => colourOf(style), options = {stroke, points: {show: false}};
    if (isArea) return {...options, fill: () => hatched(style), width: 1};
    if (role === 'front') return {...options, width: 2, dash: dashOf(style)};
    return {...options, width: 1, alpha: isOverlaid ? .2 : .3};
  }

  function axes(chart) {
    const shared = {
      stroke: () => ink('--muted'), font: '12.5px system-ui,sans-serif',
      labelFont: '12.5px system-ui,sans-serif', ticks: {show: false},
      grid: {stroke: () => ink('--line'), width: 1},
    };
    const {x_label: label, log_x: isLogX} = chart.content;
    const xLabels = (plot, values) => axisLabels(values);
    const yLabels = (plot, values) => chart.isLog ? logLabels(plot, values) : axisLabels(values);
    const ownPoints = isLogX ? {splits: plot => [...plot.data[0]], filter: (_, values) => values}
      : {};
    return [
      {...shared, ...ownPoints, label, labelSize: 18, size: 26, gap: 4, values: xLabels,
        grid: {show: false}, border: {show: true, stroke: () => ink('--rule'), width: 1}},
      {...shared, size: 56, gap: 6, values: yLabels, space: 34},
    ];
  }

  /** Draw a chart, or draw it again after its data or its axis have changed. */
  function draw(chart) {
    const width = chart.place.clientWidth;
    if (!width) return;
    if (chart.plot) chart.plot.destroy();
    const isArea = chart.content.kind === 'area';
    const [data, series] = isArea ? areaTables(chart) : lineTables(chart);
    chart.series = series;
    const xs = data[0], ends = [xs[0], xs[xs.length - 1]], isLogX = chart.content.log_x;
    const [min, max] = widened(...ends, isLogX);
    chart.whole = {min, max};
    const xRange = (plot, low, high) =>
      low === ends[0] && high === ends[1] ? [min, max] : [low, high];
    const bands = [];
    for (const one of series)
      if (one.role === 'high')
        bands.push({series: [one.index, one.index - 1], fill: () => colourOf(one.style) + '2e'});
    const fronts = series.filter(one => one.role === 'front').map(one => one.index);
    if (chart.content.band && fronts.length > 1)
      bands.push({series: [fronts[0], fronts[1]], fill: () => ink('--band')});
    const isOverlaid = chart.content.curves.length > 1;  // raw values recede behind the means
    chart.plot = new uPlot({
      width, height: HEIGHT, bands, axes: axes(chart), legend: {show: false},
      padding: [8, 22, 0, 0],
      scales: {
        x: {time: false, distr: isLogX ? 3 : 1, range: xRange},
        y: {distr: chart.isLog ? 3 : 1,
          range: plot => isArea ? stackLimits(plot) : limits(chart, plot)},
      },
      series: [{}, ...series.map(one => seriesOptions(one, isArea, isOverlaid))],
      cursor: {
        y: false, drag: {x: true, y: false, dist: 5},
        // other charts follow the cursor alone; `zoomed` hands on the zoom
        sync: {key: chart.content.x_label, filters: {sub: type => FOLLOWED.includes(type)}},
        points: {show: false}, focus: {prox: -1},
      },
      hooks: {
        draw: [plot => decorate(chart, plot)],
        setCursor: [plot => readOut(chart, plot)],
        setScale: [(plot, key) => { if (key === 'x') zoomed(chart); }],
      },
    }, data, chart.place);
    const shown = windows.get(chart.content.x_label);
    if (shown) chart.plot.setScale('x', shown);
    chart.reset.hidden = !shown;
  }

  /** Both ends of a whole x axis; a single point gets some room. */
  function widened(low, high, isLog) {
    if (low === high) return isLog ? [low / 2, high * 2] : [low - .5, high + .5];
    return isLog ? [low / 1.15, high * 1.15] : [low, high];
  }

  function stackLimits(plot) {
    const [from, to] = plot.series[0].idxs;
    const tops = plot.data[1].slice(from, to + 1).sort((a, b) => a - b);
    return [0, (tops.length ? quantile(tops, .99) : 1) * 1.12 || 1];
  }

  /** Zoom all charts over the same x axis as one. */
  function zoomed(chart) {
    if (!chart.plot) return;
    const {min, max} = chart.plot.scales.x, label = chart.content.x_label;
    const slack = 1e-6 * (chart.whole.max - chart.whole.min), before = windows.get(label);
    const isWhole = min <= chart.whole.min + slack && max >= chart.whole.max - slack;
    const isKnown = before && Math.abs(before.min - min) + Math.abs(before.max - max) < slack;
    if (isWhole ? !before : isKnown) return;
    windows.set(label, isWhole ? null : {min, max});
    for (const other of charts) {
      if (!other.plot || other.content.x_label !== label) continue;
      other.reset.hidden = isWhole;
      if (other !== chart) other.plot.setScale('x', isWhole ? other.whole : {min, max});
    }
    document.documentElement.dataset.touched = '1';
  }

  function setWindow(chart, min, max) {
    const low = Math.max(min, chart.whole.min), high = Math.min(max, chart.whole.max);
    if (high > low) chart.plot.setScale('x', {min: low, max: high});
  }

  /** Zoom by a factor around the cursor, or around the middle. */
  function zoom(chart, factor) {
    const {min, max} = chart.plot.scales.x, {left} = chart.plot.cursor;
    const centre = left >= 0 ? chart.plot.posToVal(left, 'x') : (min + max) / 2;
    setWindow(chart, centre - (centre - min) * factor, centre + (max - centre) * factor);
  }

  /** Values of the legend at the cursor, or the last ones without it. */
  function readOut(chart, plot) {
    const index = plot.cursor.left < 0 ? null : plot.cursor.idx;
    if (index === null || index === undefined) {
      chart.values.forEach((place, i) => { place.textContent = chart.last[i]; });
      chart.at.textContent = '';
      return;
    }
    const x = plot.data[0][index];
    let size = 1, first = x;
    chart.content.curves.forEach((curve, i) => {
      const k = nearest(curve.x, x), isPast = x > curve.x[curve.x.length - 1];
      if (curve.size > size) { size = curve.size; first = curve.first[k]; }
      const isArea = chart.content.kind === 'area';
      const value = isArea ? curve.mean[k] : frontValue(plot, chart, i, curve, k);
      const isBroken = curve.mean[k] === null && curve.num_broken;
      chart.values[i].textContent = isPast ? '\u2013' : isBroken ? 'not finite' : shown(value);
    });
    const unit = chart.content.x_label === 'optimizer step' ? 'step ' : '';
    const span = size > 1 ? `${first.toLocaleString('en')} to ` : '';
    chart.at.textContent = `${unit}${span}${Number(x.toPrecision(7)).toLocaleString('en')}`;
  }

  function frontValue(plot, chart, i, curve, k) {
    const series = chart.series.filter(one => one.role === 'front')[i];
    const column = plot.data[series.index], row = nearest(plot.data[0], curve.x[k]);
    return column[row];
  }

  /** Index of the value in ascending `xs` that is nearest to `x`. */
  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] < xs[high] - x ? low : high;
  }

  /** Move the cursor by a number of points; all charts over the same axis follow. */
  function moveCursor(chart, by) {
    const {plot} = chart, xs = plot.data[0], {min, max} = plot.scales.x;
    const from = plot.cursor.left < 0 ? (by > 0 ? -1 : xs.length) : plot.cursor.idx;
    let index = Math.min(xs.length - 1, Math.max(0, from + by));
    while (index < xs.length - 1 && xs[index] < min) index++;
    while (index > 0 && xs[index] > max) index--;
    plot.setCursor({left: plot.valToPos(xs[index], 'x'), top: 1}, true, true);
  }

  function onKey(chart, event) {
    const step = event.shiftKey ? Math.ceil(chart.plot.data[0].length / 20) : 1;
    const actions = {
      ArrowLeft: () => moveCursor(chart, -step), ArrowRight: () => moveCursor(chart, step),
      Home: () => moveCursor(chart, -1e9), End: () => moveCursor(chart, 1e9),
      '+': () => zoom(chart, .5), '-': () => zoom(chart, 2),
      Escape: () => chart.plot.setScale('x', chart.whole),
      l: () => { if (!chart.log.disabled) chart.log.click(); },
    };
    if (event.ctrlKey || event.metaKey || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  function button(label, title, onClick) {
    const made = document.createElement('button');
    made.type = 'button';
    made.textContent = label;
    made.title = title;
    made.addEventListener('click', onClick);
    return made;
  }

  /** The buttons of a chart: logarithmic axis, zoom in, zoom out, the whole run. */
  function addTools(chart) {
    const tools = document.createElement('span');
    tools.className = 'tools';
    const isPositive = chart.content.kind === 'line' && chart.content.curves.every(
      curve => (curve.low || curve.mean).every(y => y === null || y > 0));
    chart.log = button('log', 'logarithmic axis', () => {
      chart.isLog = !chart.isLog;
      chart.log.setAttribute('aria-pressed', chart.isLog);
      draw(chart);
    });
    chart.log.setAttribute('aria-pressed', 'false');
    chart.log.disabled = !isPositive;
    if (!isPositive) chart.log.title = 'no logarithmic axis: values are stacked, 0 or negative';
    chart.reset = button('whole', 'show the whole x axis again (Escape)',
      () => chart.plot.setScale('x', chart.whole));
    chart.reset.hidden = true;
    tools.append(chart.log, button('\u2212', 'zoom out (-)', () => zoom(chart, 2)),
      button('+', 'zoom in (+); or drag over the chart', () => zoom(chart, .5)), chart.reset);
    chart.figure.querySelector('figcaption').append(tools);
  }

  function build(chart) {
    if (chart.content) return;
    chart.content = JSON.parse(chart.figure.querySelector('script').textContent);
    addTools(chart);
    draw(chart);
  }

  function redraw() { charts.forEach(chart => { if (chart.plot) draw(chart); }); }

  for (const figure of document.querySelectorAll('figure.chart')) {
    const place = figure.querySelector('.plot'), values = [...figure.querySelectorAll('.val')];
    const title = figure.querySelector('figcaption').textContent;
    const chart = {figure, place, values, last: values.map(value => value.textContent),
      at: figure.querySelector('.at'), isLog: false};
    chart.at.setAttribute('aria-live', 'polite');
    place.tabIndex = 0;
    place.setAttribute('role', 'group');
    place.setAttribute('aria-label', `${title}: chart; arrow keys move the cursor, + and - zoom, `
      + 'Escape shows everything, l makes the axis logarithmic');
    place.addEventListener('keydown', event => onKey(chart, event));
    place.addEventListener('focus', () => { if (!chart.plot) build(chart); });
    figure.chart = chart;
    charts.push(chart);
  }

  // charts are built when they come near the screen, so that the page opens at once
  const near = new IntersectionObserver(entries => {
    for (const entry of entries)
      if (entry.isIntersecting) { near.unobserve(entry.target); build(entry.target.chart); }
  }, {rootMargin: '600px'});
  const sized = new ResizeObserver(entries => {
    for (const {target} of entries) {
      const {chart} = target.closest('figure');
      if (!chart.content || !target.clientWidth) continue;
      if (!chart.plot) draw(chart);
      else if (chart.plot.width !== target.clientWidth)
        chart.plot.setSize({width: target.clientWidth, height: HEIGHT});
    }
  });
  charts.forEach(chart => { near.observe(chart.figure); sized.observe(chart.place); });

  const slider = document.querySelector('#smoothing');
  if (slider) slider.addEventListener('input', () => {
    smoothing = [0, .5, 1, 2, 3, 5, 10, 20][slider.value];
    const words = smoothing ? `mean over ${smoothing} % of the run` : 'none';
    slider.setAttribute('aria-valuetext', words);
    document.querySelector('#smoothing-value').textContent = words;
    redraw();
  });

  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
  addEventListener('beforeprint', () => {  // on paper: all charts, in the colours of the light page
    chartInk.takeFrom(document.querySelector('.light'));
    document.querySelectorAll('details').forEach(details => { details.open = true; });
    charts.forEach(chart => { build(chart); if (chart.plot) draw(chart); });
  });
  addEventListener('afterprint', () => {
    chartInk.takeFrom(document.documentElement);
    redraw();
  });
}
