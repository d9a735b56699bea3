from benchmarks.gpu.candidates.gate import main

main()
