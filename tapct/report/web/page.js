// Large pictures on a click, and a page that loads itself again while a run trains.
for (const image of document.querySelectorAll('.pictures img'))
  image.addEventListener('click', () => image.closest('figure').classList.toggle('wide'));

{
  const box = document.querySelector('#reload');
  if (box) {
    const seconds = Number(box.dataset.seconds);
    const place = location.pathname + ' reload', kept = sessionStorage.getItem(place);
    if (kept !== null) box.checked = kept === '1';
    box.addEventListener('change', () => sessionStorage.setItem(place, box.checked ? '1' : '0'));
    let lastTouch = 0;
    for (const event of ['pointerdown', 'keydown', 'input'])
      addEventListener(event, () => { lastTouch = Date.now(); }, true);
    setInterval(() => {  // not while somebody uses the page or does not look at it
      const isUsed = Date.now() - lastTouch < 1000 * seconds || document.hidden;
      if (box.checked && !isUsed) location.reload();
    }, 1000 * seconds);
  }
}
