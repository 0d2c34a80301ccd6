//! The kept inputs, run as any test: what a fuzzer once found stays found. Then a short run with
//! changed ones.

/// Changed inputs for each target: some seconds for all of them.
const INPUTS: usize = 2000;

/// One test a target, so that a failure names it.
macro_rules! replayed {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            let target = fuzz::find(stringify!($name)).unwrap();
            let count = fuzz::replay(target, &fuzz::corpus().join(target.name)).unwrap();
            assert!(count > 0, "no inputs are kept");
            fuzz::short::run(target, INPUTS).unwrap();
        }
    )*

    #[test]
    fn every_target_is_replayed() {
        let here = [$(stringify!($name)),*];
        let mut kept: Vec<String> = std::fs::read_dir(fuzz::corpus())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        kept.sort();
        assert_eq!(kept, here);
        assert_eq!(fuzz::TARGETS.each_ref().map(|t| t.name), here);
    }};
}

replayed!(
    controller, filter, kernel, kubeconfig, mirror, procfs, qmp, values
);

/// The checkout stays small: what is kept is what reaches something that nothing else does.
#[test]
fn what_is_kept_is_little() {
    let (mut files, mut bytes) = (0, 0);
    for target in &fuzz::TARGETS {
        for entry in std::fs::read_dir(fuzz::corpus().join(target.name)).unwrap() {
            files += 1;
            bytes += entry.unwrap().metadata().unwrap().len();
        }
    }
    assert!(
        files <= 250 && bytes <= 300 << 10,
        "{files} files, {bytes} bytes"
    );
}
