// Sorts tables by a click or by Enter on a heading, and hands each table over as a CSV file.
{
  /** Text of a cell as a program reads it: a plain minus, no thin spaces. */
  function plain(cell) {
    return cell.textContent.replace(/(\d)\u2009(?=\d)/g, '$1').replace(/\u2212/g, '-')
      .replace(/\s+/g, ' ').trim();
  }

  /** Sort key of a cell: its number, or its text; null where there is none. */
  function keyOf(cell) {
    const words = cell.dataset.sort ?? plain(cell);
    if (words === '' || words === '\u2013') return null;
    const number = Number(words.replace(/ .*$/, '').replace(/^\+/, ''));
    return Number.isNaN(number) ? words : number;
  }

  function compare(a, b) {
    if (typeof a === 'number' && typeof b === 'number') return a - b;
    return String(a).localeCompare(String(b), 'en', {numeric: true});
  }

  /** Sort the rows of a table by a column; rows without a value come last. */
  function sort(table, index, isDescending) {
    for (const body of table.tBodies) {
      const rows = [...body.rows].map(row => ({row, key: keyOf(row.cells[index])}));
      const known = rows.filter(one => one.key !== null);
      known.sort((a, b) => (isDescending ? -1 : 1) * compare(a.key, b.key));
      body.append(...known.concat(rows.filter(one => one.key === null)).map(one => one.row));
    }
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      if (i === index) head.setAttribute('aria-sort', isDescending ? 'descending' : 'ascending');
      else head.removeAttribute('aria-sort');
    });
  }

  function makeSortable(table) {
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      if (head.classList.contains('track-head')) return;
      const button = document.createElement('button');
      button.type = 'button';
      button.className = 'sort';
      button.append(...head.childNodes);
      if (!button.textContent.trim()) button.setAttribute('aria-label', 'sort by name');
      head.append(button);
      button.addEventListener('click', () => {
        const isNumeric = head.classList.contains('n'), now = head.getAttribute('aria-sort');
        // numbers begin with the largest, names with the first
        sort(table, index, now ? now === 'ascending' : isNumeric);
      });
    });
  }

  /** The visible table as CSV, in the order in which it is shown; columns of bars are left out. */
  function csvOf(table) {
    const skipped = new Set();
    [...(table.tHead?.rows[0].cells ?? [])].forEach((head, i) => {
      if (head.classList.contains('track-head')) skipped.add(i);
    });
    const lines = [...table.rows].map(row => [...row.cells].filter((_, i) => !skipped.has(i))
      .map(cell => {
        const words = plain(cell);
        return /[",\n]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
      }).join(','));
    return lines.join('\r\n') + '\r\n';
  }

  function addDownload(table) {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'csv';
    button.textContent = 'CSV';
    button.title = 'download this table as a CSV file';
    button.setAttribute('aria-label', `download the table ${table.dataset.csv} as CSV`);
    button.addEventListener('click', () => {
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob(['\ufeff', csvOf(table)], {type: 'text/csv'}));
      link.download = table.dataset.csv + '.csv';
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    (table.closest('.scroll') ?? table).after(button);
  }

  document.querySelectorAll('table.sortable').forEach(makeSortable);
  document.querySelectorAll('table[data-csv]').forEach(addDownload);
  for (const place of document.querySelectorAll('.scroll')) {  // so that arrow keys scroll it
    place.tabIndex = 0;
    place.setAttribute('role', 'region');
    place.setAttribute('aria-label', `table ${place.querySelector('table')?.dataset.csv ?? ''}`);
  }
}
