// Values of charts under the pointer, large pictures on a click, open tables in print.

/** Index of the value in ascending `xs` that is nearest to `x`. */
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

function lastOf(curve) {
  return curve.x[curve.x.length - 1];
}

for (const figure of document.querySelectorAll('figure.chart')) {
  const svg = figure.querySelector('svg.plot'), cursor = svg.querySelector('.cursor');
  const {frame, series} = JSON.parse(figure.querySelector('script').textContent);
  const [x0, x1, left, right, width] = frame;
  const values = [...figure.querySelectorAll('.val')], last = values.map(v => v.textContent);
  const at = figure.querySelector('.at');
  const longest = series.reduce((a, b) => lastOf(b) > lastOf(a) ? b : a);

  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const unit = (event.clientX - box.left) / box.width * width;
    const x = Math.min(x1, Math.max(x0, x0 + (unit - left) / (right - left) * (x1 - x0)));
    const step = longest.x[nearest(longest.x, x)];
    const shown = left + (step - x0) / (x1 - x0) * (right - left);
    cursor.setAttribute('transform', `translate(${shown} 0)`);
    cursor.setAttribute('visibility', 'visible');
    at.textContent = 'at ' + Math.round(step).toLocaleString('en');
    series.forEach((one, i) => {
      const y = one.y[nearest(one.x, step)];
      if (step > lastOf(one) + (x1 - x0) / 100) values[i].textContent = '\u2013';
      else if (y === null) values[i].textContent = 'not finite';
      else values[i].textContent = Number(y.toPrecision(4)).toString().replace('-', '\u2212');
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

addEventListener('beforeprint', () => {
  document.querySelectorAll('details').forEach(details => { details.open = true; });
});
