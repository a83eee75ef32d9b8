    copy(0);
    commit();
    for (int tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) copy(tile + 1);
        commit();         // perhaps an empty group, so that the count is the same in the last round
        wait_all_but(1);  // this tile is there: only the last group may be under way
        __syncthreads();  // and all threads' parts of it
        process(tile);
        __syncthreads();  // every thread has finished with this stage; the next copy overwrites it
    }
