// The list: of any number of traces, only the rows in sight are elements. All text goes in as text, never as markup.

const HEIGHTS = { trace: 4.5, sample: 2.5, head: 4 };  // in rem, one fixed height for each kind of row
const SPARE = 6;  // rows made above and below those in sight
const DOTS = 16;  // samples drawn for a question
const BEFORE = 14;  // characters in front of a match, which must be in sight in a narrow row too
const GLYPHS = { right: '✓', wrong: '✗', unjudged: '–' };
// Words for the values of a facet; a value without one, such as a filter's name, stands for itself.
const WORDS = new Map([
  ['verdict unjudged', 'not judged'], ['status pending', 'not filtered yet'],
  ['finish stop', 'its end token'], ['finish length', 'the length limit'], ['finish loop', 'a loop'],
  ['finish error', 'an error'],
]);
const CUT = new Map([['length', 'truncated'], ['loop', 'loop'], ['error', 'failed']]);  // beside an evaluation's sample

const word = (facet, value) => WORDS.get(`${facet} ${value}`) ?? value;

const get = (id) => document.getElementById(id);

/** Return a new element with a class and children: elements, or texts. */
function make(tag, name = '', ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

const glyph = (verdict) => make('span', `glyph ${verdict}`, GLYPHS[verdict]);
const count = (number) => Math.round(number).toLocaleString('en').replaceAll(',', '\u202f');
const noun = (number, word) => (number === 1 ? word : `${word}s`);
const plural = (number, word) => `${count(number)} ${noun(number, word)}`;
const stateOf = (trace) => (
  trace.status === 'rejected' ? trace.reasons[0] : word('status', trace.status) || (CUT.get(trace.finish) ?? '')
);

/** Return a virtual list in `box`; `onOpen` is told which trace was clicked. */
function makeList(box, onOpen) {
  const canvas = make('div', 'canvas');
  canvas.setAttribute('role', 'none');
  const rows = new Map();  // by index, those that are elements
  let items = [];
  let tops = new Float64Array(1);
  let wanted = null;
  let current = null;

  function set(next, expression) {
    items = next;
    wanted = expression;
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    tops = new Float64Array(items.length + 1);
    items.forEach((item, i) => { tops[i + 1] = tops[i] + Math.round(HEIGHTS[item.kind] * rem); });
    canvas.style.height = `${tops[items.length]}px`;
    rows.clear();
    canvas.replaceChildren();
    box.replaceChildren(items.length ? canvas : make('p', 'empty', 'No trace passes these filters.'));
    draw();
  }

  /** Return the index of the row at a height. */
  function at(height) {
    let low = 0;
    let high = items.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (tops[middle] <= height) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  function draw() {
    if (!items.length) return;
    const first = Math.max(0, at(box.scrollTop) - SPARE);
    const last = Math.min(items.length - 1, at(box.scrollTop + box.clientHeight) + SPARE);
    for (const [i, row] of rows) {
      if (i < first || i > last) {
        row.remove();
        rows.delete(i);
      }
    }
    for (let i = first; i <= last; i++) {
      if (rows.has(i)) continue;
      const row = drawItem(items[i], wanted);
      row.style.top = `${tops[i]}px`;
      row.style.height = `${tops[i + 1] - tops[i]}px`;
      row.dataset.index = i;
      row.setAttribute('role', items[i].trace ? 'option' : 'none');
      if (items[i].trace) {
        row.id = `row-${i}`;
        mark(row, items[i].trace === current);
      }
      rows.set(i, row);
      canvas.append(row);
    }
  }

  function mark(row, isOpen) {
    row.classList.toggle('open', isOpen);
    row.setAttribute('aria-selected', isOpen);
    if (isOpen) box.setAttribute('aria-activedescendant', row.id);
  }

  /** Mark a trace as the open one; bring its row in sight if asked. */
  function show(trace, reveal) {
    current = trace;
    const index = indexOf(trace);
    if (reveal && index >= 0) {
      // Under its question, where one is above it.
      const top = items[index - 1]?.kind === 'head' ? tops[index - 1] : tops[index];
      if (top < box.scrollTop) box.scrollTop = top;
      else if (tops[index + 1] > box.scrollTop + box.clientHeight) box.scrollTop = tops[index + 1] - box.clientHeight;
    }
    draw();
    for (const [i, row] of rows) if (items[i].trace) mark(row, items[i].trace === trace);
  }

  const indexOf = (trace) => items.findIndex((item) => item.trace === trace);

  /** Return the trace that many places after (before, if negative) another one; null at the end. */
  function beside(trace, step) {
    const all = items.filter((item) => item.trace);
    const place = all.findIndex((item) => item.trace === trace);
    return all[place < 0 ? 0 : place + step]?.trace ?? null;
  }

  function place(trace) {
    const all = items.filter((item) => item.trace);
    return { number: all.findIndex((item) => item.trace === trace) + 1, of: all.length };
  }

  box.addEventListener('scroll', draw, { passive: true });
  new ResizeObserver(draw).observe(box);
  canvas.addEventListener('click', (event) => {
    const item = items[event.target.closest('.item')?.dataset.index];
    if (item?.trace) onOpen(item.trace);
  });
  return { set, show, beside, place, has: (trace) => indexOf(trace) >= 0, top: () => { box.scrollTop = 0; } };
}

function drawItem(item, wanted) {
  if (item.kind === 'head') return drawHead(item.question, item.shown);
  const { trace } = item;
  const line = make('span', 'line');
  line.dir = 'auto';
  if (item.kind === 'trace') {
    line.append(...(snippet([trace.question.words], wanted) ?? [begin(trace.question.words)]));
    return make(
      'div', 'item', glyph(trace.verdict), line, make('span', 'side', plural(trace.tokens, 'token')),
      said(trace, wanted, 'line second'), make('span', 'side', stateOf(trace)),
    );
  }
  const side = [stateOf(trace), plural(trace.tokens, 'token')].filter(Boolean).join(', ');
  return make('div', 'item', glyph(trace.verdict), said(trace, wanted, 'line second'), make('span', 'side', side));
}

/** Return a line with the predicted answer, and the found place or the end of the completion. */
function said(trace, wanted, name) {
  const line = make('span', name);
  line.dir = 'auto';
  if (trace.predicted) line.append(make('b', '', begin(trace.predicted, 40)), ' ');
  line.append(...(snippet([trace.thought, trace.text], wanted) ?? [end(trace.text || trace.thought)]));
  return line;
}

function drawHead(question, shown) {
  const { traces: all, right } = question;
  const line = make('span', 'line', begin(question.words));
  line.dir = 'auto';
  const dots = make('span', 'dots', ...all.slice(0, DOTS).map((trace) => make('i', trace.verdict)));
  const samples = plural(all.length, 'sample');
  const some = shown < all.length ? `${count(shown)} of ${samples} shown` : samples;
  const level = question.level === undefined ? '' : `, level ${question.level}`;
  const below = make('span', 'line second', `${count(right)} of ${count(all.length)} right, ${some}${level}`);
  return make('div', 'item head', line, dots, below);
}

const flat = (text) => text.replace(/\s+/g, ' ').trim();
const begin = (text, most = 180) => (text.length > most ? `${flat(text.slice(0, most))}…` : flat(text));
const end = (text, most = 60) => (text.length > most ? `…${flat(text.slice(-most))}` : flat(text));

/** Return the surroundings of the first match in some texts as nodes, null where there is none. */
function snippet(texts, wanted) {
  for (const text of wanted ? texts : []) {
    const match = wanted.exec(text);
    if (match) {
      const { index } = match;
      const to = index + match[0].length;
      const before = text.slice(Math.max(0, index - BEFORE), index).replace(/\s+/g, ' ');
      const after = text.slice(to, to + 140).replace(/\s+/g, ' ');
      return [(index > BEFORE ? '…' : '') + before, make('mark', '', flat(match[0])), after];
    }
  }
  return null;
}
