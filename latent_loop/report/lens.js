'use strict';
// Everything is drawn from the numbers in the page; `chosen` is the cell that was clicked or stepped to.
const data = JSON.parse(document.getElementById('numbers').textContent);
const T = data.tokens.length, R = data.depth;
const FIRST = 4;  // columns before those of the iterations
const grid = document.getElementById('grid'), detail = document.getElementById('detail');
const slider = document.getElementById('token'), start = document.getElementById('start');
const cells = [...grid.tBodies[0].rows].map(row => [...row.cells].slice(FIRST));
const chosen = {t: T - 1, i: Math.min(data.mean_depth, R) - 1};

const make = (name, content = '', attributes = {}) => {
  const node = document.createElement(name);
  node.textContent = content;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};
const label = token => data.labels[token];
const number = x => x === null ? 'not finite' : x === 0 ? '0' : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e4 ? x.toExponential(1) : x.toPrecision(3);

// What cells can be shaded by: a table of numbers, whether its logarithm is shown, and fixed ends of the scale if any.
const quantities = {
  p: {of: data.top_p.map(row => row.map(top => top[0])), ends: [0, 1]},
  next_p: {of: data.next_p.map((row, t) => t < T - 1 ? row : row.map(() => null)), ends: [0, 1]},
  entropy: {of: data.entropy},
  kl: {of: data.kl, log: true},
  distance: {of: data.distance, log: true},
};
const SMALLEST = 1e-8;  // below float32's noise
for (const q of Object.values(quantities)) {
  q.height = x => q.log ? Math.log10(Math.max(x, SMALLEST)) : x;
  const finite = q.of.flat().filter(x => x !== null);
  const reduce = (pick, start) => finite.reduce((a, x) => pick(a, x), start);
  q.ends ??= finite.length ? [q.log ? Math.max(reduce(Math.min, Infinity), SMALLEST) : 0, reduce(Math.max, 0)] : [0, 1];
  const [low, high] = q.ends.map(q.height);
  q.shade = x => x === null ? 0 : high > low ? Math.min(Math.max((q.height(x) - low) / (high - low), 0), 1) : 0;
}
const scale = q => [number(q.ends[0]) + ' ', make('span', '', {class: 'ramp'}), ' ' + number(q.ends[1])];

function shade() {
  const q = quantities[document.getElementById('shade').value];
  cells.forEach((row, t) => row.forEach((cell, i) => cell.style.setProperty('--v', q.shade(q.of[t][i]).toFixed(3))));
  document.getElementById('scale').replaceChildren(...scale(q), '.');
}

function show(t, i) {
  const next = t < T - 1 ? data.prompt_labels[t + 1] : null;
  const head = make('h3', 'After ');
  head.append(make('code', data.prompt_labels[t]), ` (position ${t}), iteration ${i + 1}`);
  const bars = data.top[t][i].map((token, k) => {
    const p = data.top_p[t][i][k], bar = make('div', '', {class: 'bar'});
    bar.append(make('span', label(token)), make('span', '', {style: `--v:${p ?? 0}`}), make('span', p === null ? '-' : (100 * p).toFixed(1) + ' %'));
    return bar;
  });
  const facts = make('dl');
  const fact = (name, value) => facts.append(make('dt', name), make('dd', value));
  if (next !== null) fact(`came: ${next}, with`, data.next_p[t][i] === null ? '-' : (100 * data.next_p[t][i]).toFixed(1) + ' %');
  fact('entropy, nats', number(data.entropy[t][i]));
  fact('KL to the iteration before', number(data.kl[t][i]));
  fact('distance to the late state', number(data.distance[t][i]));
  fact('last move / length', number(data.residual[t][i]));
  fact('KL exit', data.exit[t] ?? 'never');
  fact('states', data.motion[t]);
  detail.replaceChildren(head, ...bars, facts);
}

function choose(t, i, focus) {
  const old = cells[chosen.t][chosen.i], cell = cells[t][i];
  old.removeAttribute('aria-selected');
  old.tabIndex = -1;
  Object.assign(chosen, {t, i});
  cell.setAttribute('aria-selected', 'true');
  cell.tabIndex = 0;
  if (focus) cell.focus();
  slider.value = t;
  show(t, i);
  mark();
  drawPaths();
}

const place = cell => cell?.matches?.('td[style]') ? [cell.parentNode.sectionRowIndex, cell.cellIndex - FIRST] : null;
grid.addEventListener('click', event => { const at = place(event.target); if (at) choose(...at, true); });
grid.addEventListener('pointerover', event => { const at = place(event.target); if (at) show(...at); });
grid.addEventListener('pointerleave', () => show(chosen.t, chosen.i));
grid.addEventListener('keydown', event => {
  if (!place(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
  const page = 10, {t, i} = chosen;
  const to = {
    ArrowUp: [t - 1, i], ArrowDown: [t + 1, i], ArrowLeft: [t, i - 1], ArrowRight: [t, i + 1],
    Home: [t, 0], End: [t, R - 1], PageUp: [t - page, i], PageDown: [t + page, i],
  }[event.key];
  if (!to) return;
  event.preventDefault();
  choose(Math.min(Math.max(to[0], 0), T - 1), Math.min(Math.max(to[1], 0), R - 1), true);
});

// The maps: tokens down, iterations across, as in the table.
const MARGIN = 58, ROW = Math.max(3, Math.min(14, Math.floor(480 / T)));
const canvases = document.querySelectorAll('canvas');
const columnOf = canvas => (canvas.clientWidth - MARGIN) / R;
const color = name => {
  const probe = document.body.appendChild(make('i', '', {style: `color:var(${name})`}));
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};
function drawMaps() {
  const [ink, soft, orange] = ['--ink', '--soft', '--mark'].map(color);
  for (const canvas of canvases) {
    const q = quantities[canvas.dataset.map], width = canvas.clientWidth, dense = window.devicePixelRatio || 1;
    const column = columnOf(canvas), height = T * ROW + 16;
    const left = i => Math.round((MARGIN + i * column) * dense) / dense;  // whole pixels: no seams
    Object.assign(canvas, {width: width * dense, height: height * dense});
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext('2d');
    pen.scale(dense, dense);
    pen.font = '10px ui-monospace, monospace';
    pen.fillStyle = ink;
    q.of.forEach((row, t) => row.forEach((x, i) => {
      pen.globalAlpha = q.shade(x);
      pen.fillRect(left(i), t * ROW, left(i + 1) - left(i), ROW);
    }));
    pen.globalAlpha = 1;
    pen.textBaseline = 'middle';
    pen.fillStyle = soft;
    const every = Math.ceil(11 / ROW);
    data.prompt_labels.forEach((name, t) => {
      if (t % every === 0) pen.fillText(`${t} ${name}`, 0, t * ROW + ROW / 2, MARGIN - 4);
    });
    const ticks = [1, ...[.25, .5, .75, 1].map(part => Math.round(part * R))];
    for (const step of new Set(ticks)) pen.fillText(step, MARGIN + (step - 1) * column + Math.min(column / 4, 4) - (step === R ? 4 : 0), T * ROW + 9);
    if (canvas.dataset.map !== 'kl') continue;
    pen.strokeStyle = orange;
    data.exit.forEach((step, t) => {
      if (step) pen.strokeRect(left(step - 1) + .5, t * ROW + .5, Math.max(column - 1, 2), ROW - 1);
    });
  }
  mark();
}
function mark() {
  for (const canvas of canvases) {
    const column = columnOf(canvas), box = canvas.nextElementSibling.style;
    box.left = `${MARGIN + chosen.i * column}px`;
    box.top = `${chosen.t * ROW}px`;
    box.width = `${Math.max(column, 2)}px`;
    box.height = `${ROW}px`;
  }
}
for (const canvas of canvases) {
  const caption = canvas.parentNode.nextElementSibling;
  caption.querySelector('span').replaceChildren(...scale(quantities[canvas.dataset.map]));
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', caption.textContent);
  canvas.addEventListener('click', event => {
    const column = columnOf(canvas);
    const t = Math.floor(event.offsetY / ROW), i = Math.floor((event.offsetX - MARGIN) / column);
    if (t >= 0 && t < T && i >= 0 && i < R) choose(t, i);
  });
}

// The paths: one panel for each two principal directions.
const SVG = 'http://www.w3.org/2000/svg';
const shape = (name, attributes, content = '') => {
  const node = document.createElementNS(SVG, name);
  node.textContent = content;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};
function panel(a, b) {
  const size = 300, edge = 26, first = Number(start.value);
  const points = data.coordinates[chosen.t].slice(first).map(s => [s[a], s[b]]);
  const ends = axis => [Math.min(...points.map(p => p[axis])), Math.max(...points.map(p => p[axis]))];
  const [x, y] = [ends(0), ends(1)], span = Math.max(x[1] - x[0], y[1] - y[0]) || 1;  // one unit for both axes
  const at = p => [[p[0], x], [p[1], y]].map(([v, [low, high]], axis) => {
    const middle = (v - (low + high) / 2) / span * (size - 2 * edge);
    return size / 2 + (axis ? -middle : middle);
  });
  const percent = k => `direction ${k + 1} (${(100 * data.explained[k]).toPrecision(2)} %)`;
  const svg = shape('svg', {viewBox: `0 0 ${size} ${size}`, role: 'img'});
  svg.append(shape('title', {}, `Path of the states in directions ${a + 1} and ${b + 1}`));
  const places = points.map(at), style = {stroke: 'var(--ink)', fill: 'none'};
  const depth = k => .25 + .75 * (first + k) / R;
  for (let k = 1; k < places.length; k++) {
    const [[x1, y1], [x2, y2]] = [places[k - 1], places[k]];
    svg.append(shape('line', {x1, y1, x2, y2, ...style, 'stroke-width': 1.5, 'stroke-opacity': depth(k)}));
  }
  places.forEach(([cx, cy], k) => {
    const filled = {fill: 'var(--ink)', 'fill-opacity': depth(k), r: first + k === R ? 4.5 : 2};
    svg.append(shape('circle', {cx, cy, ...(k ? filled : {...style, r: 5})}));
  });
  if (chosen.i + 1 >= first) {
    const [cx, cy] = places[chosen.i + 1 - first];
    svg.append(shape('circle', {cx, cy, r: 7, fill: 'none', stroke: 'var(--mark)', 'stroke-width': 2}));
  }
  const words = {fill: 'var(--soft)', 'font-size': 11, 'text-anchor': 'middle'};
  svg.append(shape('text', {x: size / 2, y: size - 6, ...words}, percent(a)));
  svg.append(shape('text', {x: 12, y: size / 2, ...words, transform: `rotate(-90 12 ${size / 2})`}, percent(b)));
  return svg;
}
function drawPaths() {
  const pairs = [[0, 1], [2, 3], [4, 5]].filter(pair => pair[1] < data.explained.length);
  const box = document.getElementById('panels');
  box.replaceChildren(...pairs.map(pair => { const figure = make('figure'); figure.append(panel(...pair)); return figure; }));
  if (!pairs.length) box.append(make('p', 'The states are not finite, so they have no principal directions.'));
  document.getElementById('chosen').textContent = `${chosen.t} ${data.prompt_labels[chosen.t]}: ${data.motion[chosen.t]}`;
  document.getElementById('started').textContent = start.value;
}

document.body.classList.add('live');
grid.setAttribute('role', 'grid');
cells.flat().forEach(cell => { cell.tabIndex = -1; });
slider.max = T - 1;
start.max = R - 1;
start.addEventListener('input', drawPaths);
slider.addEventListener('input', () => choose(Number(slider.value), chosen.i));
document.getElementById('shade').addEventListener('change', shade);
addEventListener('resize', drawMaps);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawMaps);
shade();
drawMaps();
choose(chosen.t, chosen.i);
