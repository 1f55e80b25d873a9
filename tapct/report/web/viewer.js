// Slices of a test scan in three planes: CT, label maps and feature colours, moved by one slider.
// Voxels are indexed (z, y, x): z grows towards the head, y to the back, x to the patient's left.
// Slices are shown as radiologists view them: the patient's right on the left.
{
  const AXES = {axial: 0, coronal: 1, sagittal: 2};
  // letters at the left, right, top and bottom edge
  const LETTERS = {axial: 'RLAP', coronal: 'RLSI', sagittal: 'APSI'};
  const BARS_MM = [1, 2, 5, 10, 20, 50, 100, 200];

  /** Decode tiles into values: Uint8Array with `channels` values per voxel, in order z, y, x. */
  async function decode(array, channels) {
    const image = new Image();
    image.src = array.url;
    await image.decode();
    const canvas = document.createElement('canvas');
    canvas.width = image.width;
    canvas.height = image.height;
    const pen = canvas.getContext('2d', {willReadFrequently: true});
    pen.drawImage(image, 0, 0);
    const [depth, height, width] = array.shape;
    const values = new Uint8Array(depth * height * width * channels);
    let k = 0;
    for (let z = 0; z < depth; z++) {
      const left = z % array.columns * width, top = Math.floor(z / array.columns) * height;
      const {data} = pen.getImageData(left, top, width, height);
      for (let i = 0; i < data.length; i += 4)
        for (let c = 0; c < channels; c++) values[k++] = data[i + c];
    }
    return {values, shape: array.shape};
  }

  /** Columns, rows and voxel of each pixel of a slice: (column, row) -> [z, y, x]. */
  function planeOf(viewer) {
    const [depth, height, width] = viewer.content.shape, at = viewer.position[viewer.plane];
    const [mz, my, mx] = viewer.content.spacing;
    if (viewer.plane === 'axial')
      return {columns: width, rows: height, mm: [mx, my], voxel: (u, v) => [at, v, u]};
    if (viewer.plane === 'coronal')
      return {columns: width, rows: depth, mm: [mx, mz], voxel: (u, v) => [depth - 1 - v, at, u]};
    return {columns: height, rows: depth, mm: [my, mz], voxel: (u, v) => [depth - 1 - v, u, at]};
  }

  /** Grey value of each of the 256 levels of the CT in a window. */
  function greys({levels, windows}, name) {
    const [centre, width] = windows[name], table = new Uint8ClampedArray(256);
    for (let level = 0; level < 256; level++) {
      let k = 1;
      while (k < levels.length - 1 && levels[k][1] < level) k++;
      const [hu0, level0] = levels[k - 1], [hu1, level1] = levels[k];
      const hu = hu0 + (level - level0) / (level1 - level0) * (hu1 - hu0);
      table[level] = 255 * (hu - centre + width / 2) / width;
    }
    return table;
  }

  /** A slice of the CT as a canvas of one pixel per voxel. */
  function ctSlice(viewer, plane) {
    const canvas = document.createElement('canvas'), {columns, rows} = plane;
    canvas.width = columns;
    canvas.height = rows;
    const pen = canvas.getContext('2d'), image = pen.createImageData(columns, rows);
    const table = greys(viewer.content, viewer.window), {values, shape} = viewer.ct;
    let k = 0;
    for (let v = 0; v < rows; v++)
      for (let u = 0; u < columns; u++) {
        const [z, y, x] = plane.voxel(u, v);
        const grey = table[values[(z * shape[1] + y) * shape[2] + x]];
        image.data[k++] = grey;
        image.data[k++] = grey;
        image.data[k++] = grey;
        image.data[k++] = 255;
      }
    pen.putImageData(image, 0, 0);
    return canvas;
  }

  /** Feature colours of a slice, interpolated between the centres of the patches; black outside
      the body. */
  function featureSlice(viewer, plane, layer) {
    const canvas = document.createElement('canvas'), {columns, rows} = plane;
    canvas.width = columns;
    canvas.height = rows;
    const pen = canvas.getContext('2d'), image = pen.createImageData(columns, rows);
    const {values, shape} = layer.array, body = viewer.body;
    let k = 0;
    for (let v = 0; v < rows; v++)
      for (let u = 0; u < columns; u++, k += 4) {
        image.data[k + 3] = 255;
        const voxel = plane.voxel(u, v);
        const index = (voxel[0] * body.shape[1] + voxel[1]) * body.shape[2] + voxel[2];
        if (!body.values[index]) continue;
        const low = [0, 0, 0], share = [0, 0, 0];
        for (let axis = 0; axis < 3; axis++) {
          const centre = (voxel[axis] + .5) * layer.step[axis] - .5;
          const at = Math.min(shape[axis] - 1, Math.max(0, centre));
          low[axis] = Math.min(Math.floor(at), Math.max(0, shape[axis] - 2));
          share[axis] = at - low[axis];
        }
        for (let corner = 0; corner < 8; corner++) {
          let weight = 1, index = 0;
          for (let axis = 0; axis < 3; axis++) {
            const isFar = corner >> axis & 1;
            weight *= isFar ? share[axis] : 1 - share[axis];
            index = index * shape[axis] + low[axis] + isFar;
          }
          if (weight)
            for (let c = 0; c < 3; c++) image.data[k + c] += weight * values[3 * index + c];
        }
      }
    pen.putImageData(image, 0, 0);
    return canvas;
  }

  /** Paint a label map over a slice: transparent organs with an opaque rim, those of the left with
      a hatch. */
  function paintLabels(viewer, plane, layer, canvas) {
    const {width, height} = canvas;
    const pen = canvas.getContext('2d', {willReadFrequently: true});
    const {values, shape} = layer.array, classes = new Uint8Array(width * height);
    for (let v = 0; v < height; v++) {
      const row = Math.min(plane.rows - 1, Math.floor((v + .5) / height * plane.rows));
      for (let u = 0; u < width; u++) {
        const column = Math.min(plane.columns - 1, Math.floor((u + .5) / width * plane.columns));
        const [z, y, x] = plane.voxel(column, row);
        classes[v * width + u] = values[(z * shape[1] + y) * shape[2] + x];
      }
    }
    const image = pen.getImageData(0, 0, width, height), {data} = image;
    const rim = Math.max(1, Math.round(1.2 * devicePixelRatio)), gap = 7 * devicePixelRatio;
    for (let v = 0; v < height; v++)
      for (let u = 0; u < width; u++) {
        const i = v * width + u, organ = layer.organs.get(classes[i]);
        if (!organ || viewer.hidden.has(organ.name)) continue;
        const isRim = u < rim || v < rim || u >= width - rim || v >= height - rim
          || classes[i - rim] !== classes[i] || classes[i + rim] !== classes[i]
          || classes[i - rim * width] !== classes[i] || classes[i + rim * width] !== classes[i];
        const isStripe = organ.hatched && (u + v) % gap < gap / 3;
        const share = isRim ? .95 : organ.hatched ? (isStripe ? .8 : .12) : .42;
        for (let c = 0; c < 3; c++)
          data[4 * i + c] = (1 - share) * data[4 * i + c] + share * organ.rgb[c];
      }
    pen.putImageData(image, 0, 0);
  }

  /** Letters of the patient's directions at the edges, and a bar of a round length. */
  function annotate(viewer, plane, canvas) {
    const pen = canvas.getContext('2d'), ratio = devicePixelRatio, {width, height} = canvas;
    const [left, right, top, bottom] = LETTERS[viewer.plane], edge = 5 * ratio;
    pen.font = `600 ${12 * ratio}px system-ui,sans-serif`;
    pen.lineWidth = 3 * ratio;
    pen.strokeStyle = '#000';
    pen.fillStyle = '#fff';
    const write = (words, x, y, align, base) => {
      pen.textAlign = align;
      pen.textBaseline = base;
      pen.strokeText(words, x, y);
      pen.fillText(words, x, y);
    };
    write(left, edge, height / 2, 'left', 'middle');
    write(right, width - edge, height / 2, 'right', 'middle');
    write(top, width / 2, edge, 'center', 'top');
    write(bottom, width / 2, height - edge, 'center', 'bottom');
    const pixelsPerMm = width / (plane.columns * plane.mm[0]);
    const bar = BARS_MM.filter(mm => mm * pixelsPerMm <= .3 * width).pop() ?? 1;
    const length = bar * pixelsPerMm, x = width - 2 * edge - length, y = height - 2 * edge;
    pen.fillStyle = '#000';
    pen.fillRect(x - ratio, y - ratio, length + 2 * ratio, 5 * ratio);
    pen.fillStyle = '#fff';
    pen.fillRect(x, y, length, 3 * ratio);
    pen.font = `${11 * ratio}px system-ui,sans-serif`;
    write(`${bar} mm`, x + length, y - 3 * ratio, 'right', 'bottom');
  }

  function drawAll(viewer) {
    const plane = planeOf(viewer), shownWidth = viewer.panels[0].canvas.clientWidth;
    if (!shownWidth) return;
    const aspect = plane.rows * plane.mm[1] / (plane.columns * plane.mm[0]);
    const width = Math.round(shownWidth * devicePixelRatio), height = Math.round(width * aspect);
    const ct = ctSlice(viewer, plane);
    for (const panel of viewer.panels) {
      panel.canvas.width = width;
      panel.canvas.height = height;
      const pen = panel.canvas.getContext('2d', {willReadFrequently: Boolean(panel.labels)});
      pen.imageSmoothingQuality = 'high';
      pen.drawImage(panel.feature ? featureSlice(viewer, plane, panel.feature) : ct, 0, 0, width,
        height);
      if (panel.labels) paintLabels(viewer, plane, panel.labels, panel.canvas);
      annotate(viewer, plane, panel.canvas);
    }
  }

  function redraw(viewer) {
    if (viewer.isQueued || !viewer.ct) return;
    viewer.isQueued = true;
    requestAnimationFrame(() => { viewer.isQueued = false; drawAll(viewer); });
  }

  /** Show the slice of the slider: numbers of the original slices, which the reduced ones hold. */
  function moved(viewer) {
    if (!viewer.content) return;
    const axis = AXES[viewer.plane], size = viewer.content.shape[axis];
    const at = viewer.position[viewer.plane], k = viewer.content.reduced[axis];
    viewer.slider.max = size - 1;
    viewer.slider.value = at;
    const mm = (at * viewer.content.spacing[axis]).toFixed(0);
    const words = k === 1 ? `${at} of ${size - 1}` : `${at * k} to ${at * k + k - 1}`;
    viewer.where.textContent = `slice ${words}, ${mm} mm`;
    viewer.slider.setAttribute('aria-valuetext', `${viewer.plane} slice ${words}`);
    redraw(viewer);
  }

  function addPanel(viewer, title, content) {
    const panel = document.createElement('figure'), canvas = document.createElement('canvas');
    const caption = document.createElement('figcaption');
    caption.textContent = title;
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', title);
    panel.append(caption, canvas);
    viewer.place.append(panel);
    viewer.panels.push({canvas, ...content});
    canvas.addEventListener('wheel', event => {  // with Ctrl: the wheel alone scrolls the page
      if (!event.ctrlKey) return;
      event.preventDefault();
      step(viewer, Math.sign(event.deltaY));
    }, {passive: false});
  }

  function step(viewer, by) {
    const size = viewer.content.shape[AXES[viewer.plane]];
    const at = viewer.position[viewer.plane] + by;
    viewer.position[viewer.plane] = Math.min(size - 1, Math.max(0, at));
    moved(viewer);
  }

  /** Decode the voxels and show each panel as soon as it is decoded, the CT first. */
  async function open(viewer) {
    if (viewer.content) return;
    viewer.content = JSON.parse(viewer.figure.querySelector('script').textContent);
    const {content} = viewer, [z, y, x] = content.start;
    viewer.position = {axial: z, coronal: y, sagittal: x};
    // first row: CT and features; second row: truth, and each prediction below the features it uses
    const columns = 1 + Math.max(content.features.length, content.labels.length - 1);
    viewer.place.style.setProperty('--columns', columns);
    viewer.ct = await decode(content.ct, 1);
    addPanel(viewer, 'CT', {});
    moved(viewer);
    viewer.body = await decode(content.body, 1);
    for (const layer of content.features) {
      const array = await decode(layer.array, 3);
      addPanel(viewer, `features: ${layer.title}`, {feature: {step: layer.step, array}});
      redraw(viewer);
    }
    for (const layer of content.labels) {
      const organs = new Map(layer.organs.map(([index, name, colour, hatched]) => {
        const rgb = [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
        return [index, {name, rgb, hatched}];
      }));
      const array = await decode(layer.array, 1);
      addPanel(viewer, layer.title === 'truth' ? 'truth' : `predicted: ${layer.title}`,
        {labels: {organs, array}});
      redraw(viewer);
    }
    viewer.figure.dataset.ready = '1';
  }

  function connect(figure) {
    const viewer = {figure, panels: [], hidden: new Set(), plane: 'axial',
      place: figure.querySelector('.panels'), slider: figure.querySelector('.position'),
      where: figure.querySelector('.where'), window: figure.querySelector('.window').value};
    viewer.slider.addEventListener('input', () => {
      viewer.position[viewer.plane] = Number(viewer.slider.value);
      document.documentElement.dataset.touched = '1';
      moved(viewer);
    });
    for (const radio of figure.querySelectorAll('input[type=radio]'))
      radio.addEventListener('change', () => { viewer.plane = radio.value; moved(viewer); });
    figure.querySelector('.window').addEventListener('change', event => {
      viewer.window = event.target.value;
      redraw(viewer);
    });
    for (const button of figure.querySelectorAll('.organ'))
      button.addEventListener('click', () => {
        const {organ} = button.dataset, isShown = viewer.hidden.delete(organ);
        if (!isShown) viewer.hidden.add(organ);
        button.setAttribute('aria-pressed', isShown);
        redraw(viewer);
      });
    new ResizeObserver(() => redraw(viewer)).observe(viewer.place);
    figure.viewer = viewer;
    return viewer;
  }

  const near = new IntersectionObserver(entries => {
    for (const entry of entries)
      if (entry.isIntersecting) { near.unobserve(entry.target); open(entry.target.viewer); }
  }, {rootMargin: '400px'});
  for (const figure of document.querySelectorAll('figure.viewer')) {
    connect(figure);
    near.observe(figure);
  }
}
